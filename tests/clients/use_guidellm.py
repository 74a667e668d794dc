"""GuideLLM: https://github.com/vllm-project/guidellm, a short run"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPORT = Path(tempfile.mkdtemp()) / "report.json"
BACKEND = {
    "kind": "openai_http",
    "target": os.environ["OPENAI_BASE_URL"].removesuffix("/v1"),  # http://127.0.0.1:8000
    "model": "smollm2-135m",
    "api_key": os.environ["OPENAI_API_KEY"],
}
OPTIONS = {
    "--backend": json.dumps(BACKEND),
    "--tokenizer": f"kind=huggingface_auto,model={os.environ['MODEL_FOLDER']}",
    "--data": "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
    "--profile": "kind=concurrent,streams=2",
    "--constraint": "kind=max_requests,count=6",
    "--output": f"kind=json,path={REPORT}",
}
command = [Path(sys.executable).with_name("guidellm"), "run", "--disable-progress"]
command += [word for option in OPTIONS.items() for word in option]
subprocess.run(command, check=True, stdout=sys.stderr)

(benchmark,) = json.loads(REPORT.read_text())["benchmarks"]
assert len(benchmark["requests"]["successful"]) == 6
assert not benchmark["requests"]["errored"]
for request in benchmark["requests"]["successful"]:
    assert request["output_tokens"] == 16
    assert request["time_to_first_token_ms"] > 0
print("synthetic text at two streams")
