"""GET /: the page. It shows what /placement says and lets people try the model.

Its files are here and the same everywhere; what it shows it asks for itself, with a key if one is
needed. `docs/page.md` says what each number means.
"""

from flask import Flask
from flask import Response

from service.errors import UnknownFile
from service.web import routes
from service.web.files import STATIC
from service.web.files import sent
from service.web.routes import Operation

PAGE = STATIC / "page"
# by the name that the page has for it
FILES = {
    **{path.name: path for path in PAGE.iterdir() if path.suffix in (".js", ".css")},
    "deep-chat.js": STATIC / "deep-chat" / "deepChat.bundle.js",
    "treemap.js": STATIC / "echarts" / "treemap.js",
}


def add_routes(app: Flask) -> None:
    def page() -> Response:
        return sent(PAGE / "index.html")

    def page_file(name: str) -> Response:
        if name not in FILES:
            raise UnknownFile("the page has no file of this name")
        return sent(FILES[name])

    shown = Operation("The page: the live placement, and a chat to try the model", "text/html")
    routes.add(app, "/", page, shown)
    part = Operation("A script or a style of that page", "text/*", errors=(UnknownFile,))
    routes.add(app, "/page/<name>", page_file, part)
