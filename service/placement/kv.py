"""How much KV cache is kept: the plan reserves it and the engine allocates it by these numbers.

What is kept is what transformers hands to the attention function, because models are unmodified:
grouped heads stay grouped, and multi-head latent attention arrives expanded to all its heads.
"""

# tokens of one page of KV on a CUDA device
PAGE_TOKENS = 64
# most tokens that one step of the engine computes, per kind of device; longer prompts are cut
STEP_TOKENS = {"cpu": 512, "cuda": 2048}
# most tokens of a step with prompts that is captured as CUDA graphs
CAPTURED_TOKENS = 1024
# most tokens of prompts whose logprobs are wanted that one step computes: the logits of all of them
# are there at once, and looked at so many rows at a time
SCORE_TOKENS = 64
SCORE_ROWS = 8


def kept_tokens(
    context: int,
    window: int | None,
    *,
    on_cuda: bool,
    step_tokens: int = STEP_TOKENS["cuda"],
) -> int:
    """Tokens of KV that one sequence of `context` tokens keeps in one attention layer.

    window is the layer's sliding window in tokens, None for full attention. A layer on the CPU
    keeps a slot: the whole context, or a ring of one window. On CUDA it keeps whole pages; with a
    window as many as the window and the step being computed can lie on, wherever the window
    starts in its page. step_tokens matters on CUDA only.
    """
    if not on_cuda:
        return context if window is None else min(context, window)
    whole = pages(context)
    if window is None:
        return whole * PAGE_TOKENS
    return min(whole, pages(window + step_tokens) + 1) * PAGE_TOKENS


def pool_tokens(
    kv_tokens: int,
    context: int,
    sequences: int,
    window: int | None,
    *,
    on_cuda: bool,
    step_tokens: int = STEP_TOKENS["cuda"],
) -> int:
    """Tokens of KV that one attention layer keeps for all sequences together.

    kv_tokens is the deployment's budget; context x sequences is all that can ever be used. On CUDA
    a smaller budget is that many tokens in whole pages, shared, and one scratch page is added,
    where padding is written. On the CPU it is whole slots: `running(...)` sequences at once.
    """
    kept = kept_tokens(context, window, on_cuda=on_cuda, step_tokens=step_tokens)
    if not on_cuda:
        return kept * running(kv_tokens, context, sequences, on_cuda=False)
    most = kept * sequences
    if kv_tokens < context * sequences:
        most = min(most, pages(kv_tokens) * PAGE_TOKENS)
    return most + PAGE_TOKENS


def running(kv_tokens: int, context: int, sequences: int, *, on_cuda: bool) -> int:
    """Sequences that can run at once: on the CPU no more than the budget has whole contexts."""
    return sequences if on_cuda else max(1, min(sequences, kv_tokens // context))


def pages(tokens: int) -> int:
    """Pages that hold `tokens` tokens of one sequence."""
    return -(-tokens // PAGE_TOKENS)
