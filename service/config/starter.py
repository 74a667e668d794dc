"""The file that `moorage config init` writes."""

STARTER = """\
# yaml-language-server: $schema=./moorage.schema.json
# All keys: docs/config.md. What is in effect, and why: moorage config show --origin
version: 1
deployment: laptop              # which block runs; --deployment or MOORAGE_DEPLOYMENT overrides

server:
  bind: 127.0.0.1:8000          # 0.0.0.0:8000 for every interface; then set API keys
  # threads: 64                 # open requests; one process owns the model
  # max_queue: 256              # sequences that may wait; beyond: 429 with Retry-After
  # api_keys_file: secrets/keys # NAME: KEY a line, or env MOORAGE_API_KEYS; never a key here

defaults:                       # every deployment starts from these
  max_context: 4096             # tokens of one sequence, prompt and answer together
  max_sequences: 8              # sequences that run at once
  # on_no_fit: refuse           # refuse | offload-cpu | offload-disk

deployments:
  laptop:
    model: smollm2-135m         # folder, hub id[@revision], REPO:FILE.gguf, or a known name
    strategy: cpu               # moorage plugins list

  # gpu:
  #   model: meta-llama/Llama-3.2-3B-Instruct
  #   strategy: single-gpu
  #   quantize: nf4             # none | nf4 | fp4 | int8 | int4 (cpu)
  #   keep_free: {cuda: 1GiB}
  #   # tried in order, each in a clean state, each proven; a step may differ from the deployment
  #   fallback: [{strategy: single-gpu, max_context: 2048}, auto-shard, cpu]
"""
