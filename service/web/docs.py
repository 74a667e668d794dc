"""GET /docs: a page that shows /openapi.json, from files that are here. No other host is asked."""

from pathlib import Path

from flask import Flask
from flask import Response

from service.web import routes
from service.web.routes import Operation

STATIC = Path(__file__).parent / "static"
SWAGGER_UI = STATIC / "swagger-ui"
# Scripts and styles of this server only, none inside the page. Pictures inside the style sheet are
# data. Requests go to this server only, so a key that is typed in goes nowhere else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FRESH_S = 3600


def add_routes(app: Flask) -> None:
    def docs() -> Response:
        answer = _sent(STATIC / "docs.html", "text/html")
        answer.headers["Content-Security-Policy"] = POLICY
        return answer

    def docs_script() -> Response:
        return _sent(STATIC / "docs.js", "text/javascript")

    def docs_bundle() -> Response:
        return _sent(SWAGGER_UI / "swagger-ui-bundle.js", "text/javascript")

    def docs_style() -> Response:
        return _sent(SWAGGER_UI / "swagger-ui.css", "text/css")

    page = Operation("The OpenAPI document as a page", "text/html")
    script = Operation("A script of that page", "text/javascript")
    style = Operation("The style of that page", "text/css")
    routes.add(app, "/docs", docs, page)
    routes.add(app, "/docs/docs.js", docs_script, script)
    routes.add(app, "/docs/swagger-ui-bundle.js", docs_bundle, script)
    routes.add(app, "/docs/swagger-ui.css", docs_style, style)


def _sent(path: Path, mimetype: str) -> Response:
    answer = Response(path.read_bytes(), mimetype=mimetype)
    answer.headers["Cache-Control"] = f"public, max-age={FRESH_S}"
    return answer
