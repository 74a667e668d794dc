"""In the site a link that is called by its file, [operations.md](operations.md), has the page's title."""

import posixpath
import re

LINK = re.compile(r"\[(?:[\w./-]+/)?[\w-]+\.md\]\(([\w./-]+\.md)((?:#[\w-]+)?)\)")


def on_page_markdown(markdown, page, files, **_):
    """Called by mkdocs for every page before it is rendered."""
    folder = posixpath.dirname(page.file.src_uri)

    def titled(link):
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        found = files.get_file_from_path(path)
        if found is None or found.page is None:
            return link[0]  # the strict build says that it leads nowhere
        return f"[{found.page.title}]({link[1]}{link[2]})"

    return LINK.sub(titled, markdown)
