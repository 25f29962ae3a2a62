"""A `vllm` command without vLLM: answers /health, and has a child as vLLM has; or ends with an error."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    if "--error" in sys.argv:
        print("(EngineCore pid=7) INFO 11-30 loading")
        print("(EngineCore pid=7) ERROR 11-30 [core.py:1] ValueError:", sys.argv[sys.argv.index("--error") + 1])
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
    child = subprocess.Popen(["sleep", "600"])
    about = {"argv": sys.argv[1:], "pids": [os.getpid(), child.pid], "added": os.environ.get("ADDED")}
    Path(os.environ["ABOUT"]).write_text(json.dumps(about), "utf-8")
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
