"""Files that browsers read: pages, their scripts and styles. They are the same everywhere."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from flask import Response
from flask import request

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# The three styles that columns of a table in an answer may have, and no other: they stand in the
# HTML that deep-chat makes of Markdown.
ALIGNED = " ".join(
    f"'sha256-{b64encode(sha256(f'text-align:{side}'.encode()).digest()).decode()}'"
    for side in ("left", "center", "right")
)
# Scripts and styles of this server only, none inside the page. Pictures inside a style sheet are
# data. Requests go to this server only, so a key that is typed in goes nowhere else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self';"
    f" style-src-attr 'unsafe-hashes' {ALIGNED}; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def sent(path: Path) -> Response:
    """A file as it is now. A browser keeps it, and asks each time whether it still is the same:
    after an upgrade the parts of a page must not be of two versions.
    """
    answer = Response(path.read_bytes(), mimetype=TYPES[path.suffix])
    answer.headers["Cache-Control"] = "no-cache"
    if path.suffix == ".html":
        answer.headers["Content-Security-Policy"] = POLICY
    answer.add_etag()
    answer.make_conditional(request)
    return answer
