"""How short prompts are kept from waiting behind long ones, and long ones from waiting for ever. Pure policy over token counts.

A prompt is short if it fits half a step, and stays so or not, whatever is left of it.
"""

from collections.abc import Sequence

LONG_SHARE = 4
"""While both kinds are there, one token in so many of the budget belongs to the oldest long prompt."""
POOL_SHARE = 8
"""One KV block in so many is left to short prompts."""
PATIENCE = 4
"""How many times its own tokens a long prompt lets pass before it; then nobody passes, and it may take the last block."""
EXCESS = 8
"""One token in so many may be added to a step so that it need not leave a prompt to the next."""


def short_tokens(token_budget: int) -> int:
    """Most tokens of a short prompt; and so many a step is filled to."""
    return token_budget // 2


def share_step(sizes: Sequence[int], remaining: Sequence[int], budget: int) -> list[int]:
    """Tokens of each prompt in the next step, oldest first, given how many it had in all and how many are left.

    A step is filled to half of the budget, which keeps the device busy; more would make all of its prompts wait for the slowest. It
    takes prompts whole: one that does not fit any more waits for the next step, and one that is the first, or lacks little, may go
    beyond the half. Only what is longer than half is ever cut, and only a prompt longer than the budget needs several steps if
    nobody else is there. First come, first served; but short ones come before long ones, for which a share is kept, and then they
    fill all the rest, so that the share is paid by few steps.
    """
    half = short_tokens(budget)
    shorts = [left if size <= half else 0 for size, left in zip(sizes, remaining, strict=True)]
    longs = [0 if size <= half else left for size, left in zip(sizes, remaining, strict=True)]
    if not any(shorts) or not any(longs):
        return _pack(remaining, half, budget)
    long_share = max(1, budget // LONG_SHARE)
    first = _pack(shorts, budget - long_share, budget - long_share)
    second = _fill(longs, max(long_share, half - sum(first)))
    return [short + long for short, long in zip(first, second, strict=True)]


def _pack(remaining: Sequence[int], wanted: int, limit: int) -> list[int]:
    shares, used = [0] * len(remaining), 0
    for index, tokens in enumerate(remaining):
        room = max(wanted - used, 0)
        if tokens <= min(room + wanted // EXCESS, limit - used):
            shares[index] = tokens
        elif not used:
            shares[index] = min(tokens, limit)
        elif tokens > wanted:
            shares[index] = room
        used += shares[index]
        if shares[index] < tokens or used >= wanted:
            break
    return shares


def _fill(remaining: Sequence[int], budget: int) -> list[int]:
    shares = []
    for tokens in remaining:
        shares.append(min(tokens, budget))
        budget -= shares[-1]
    return shares
