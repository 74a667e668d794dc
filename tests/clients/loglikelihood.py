"""log p(continuation | context) by plain transformers, in float32: what lm-eval must find.

Usage: python loglikelihood.py FOLDER < pairs.json, where pairs.json is a list of
[context, continuation]. Writes a list of [sum of logprobs, whether each token is the likeliest].
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
found = []
for context, continuation in json.load(sys.stdin):
    length = len(tokenizer(context).input_ids)
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = model(ids).logits[0, length - 1 : -1].log_softmax(-1)
    chosen = ids[0, length:]
    total = logprobs.gather(1, chosen[:, None]).sum().item()
    found.append([total, bool((logprobs.argmax(-1) == chosen).all())])
json.dump(found, sys.stdout)
