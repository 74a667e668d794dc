"""/docs: Swagger UI on our document, under a policy that forbids nearly everything."""

from playwright.sync_api import expect


def test_the_operations_are_shown(url, visit):
    page = visit(url, "/docs").page
    expect(page.locator("#operations-default-placement")).to_contain_text("/placement")
    chat = page.locator(".opblock").filter(has_text="/v1/chat/completions").first
    chat.click()
    expect(chat).to_contain_text("Parameters")
