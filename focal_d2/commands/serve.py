"""Serve a local page: drop a picture, see the detections, move the threshold. And a JSON endpoint.

curl --data-binary @field.jpg http://127.0.0.1:8000/detect

Only programs of this machine reach it, unless --host says otherwise: it knows no passwords.
"""

from __future__ import annotations

import argparse
import logging
import socket

from focal_d2.commands.cli import Parser, add_config_options, add_trust_flag
from focal_d2.console import tell
from focal_d2.errors import UserError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_options(parser: Parser) -> None:
    """Add the options."""
    add_config_options(parser)
    parser.add_argument("--host", default=_LOOPBACK[0], help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one (8000)")
    parser.add_argument("--megabytes", type=float, default=50.0, help="largest file that is taken (50)")
    parser.add_argument("--megapixels", type=float, default=50.0, help="largest picture that is taken (50)")
    add_trust_flag(parser)


def run(args: argparse.Namespace) -> None:
    """Build the predictor, and serve until Ctrl-C."""
    if not (args.megabytes > 0 and args.megapixels > 0):
        raise UserError("--megabytes and --megapixels must be above 0")
    try:
        import uvicorn

        from focal_d2.serve import Limits, build_app
    except ImportError as error:
        raise UserError(
            f"serve needs FastAPI and uvicorn ({error}): pip install 'focal_d2[serve]'"
        ) from error
    from focal_d2.engine import load_config
    from focal_d2.inference import Predictor

    trust = {"trust_files": args.trust_files, "allow_download": args.allow_download}
    most = ["INPUT.FOCAL.MAX_PIXELS", str(max(1, int(args.megapixels * 1e6)))]
    cfg = load_config(args.config_file, [*most, *args.opts], **trust)
    predictor = Predictor(cfg, threshold=0.0, **trust)
    hosts = [*_LOOPBACK[:2], "[::1]"] if args.host in _LOOPBACK else ["*"]
    app = build_app(predictor, Limits(args.megabytes), hosts=hosts)
    try:
        listener = socket.create_server(
            (args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on --host {args.host} --port {args.port}: {error}") from error
    if hosts == ["*"]:
        tell(f"everyone who reaches {args.host} can use it: there are no passwords")
    host = f"[{args.host}]" if ":" in args.host else args.host
    tell(f"http://{host}:{listener.getsockname()[1]}/  (Ctrl-C ends it)")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_keep_alive=5, limit_concurrency=100)
    )
    server.run(sockets=[listener])
