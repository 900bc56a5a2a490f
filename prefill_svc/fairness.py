"""How short prompts are kept from waiting behind long ones, and long ones from waiting for ever. Pure policy over token counts.

Within a step, and while waiting for blocks, a prompt is short if it fits half a step.
"""

from collections.abc import Sequence

LONG_SHARE = 4
"""While both kinds are there, one token in so many of the budget belongs to the oldest long prompt."""
POOL_SHARE = 8
"""One KV block in so many is left to short prompts."""
PATIENCE = 4
"""How many times its own tokens a long prompt lets pass before it; then nobody passes, and it may take the last block."""


def short_tokens(token_budget: int) -> int:
    """Most tokens of a short prompt."""
    return token_budget // 2


def share_step(remaining: Sequence[int], budget: int) -> list[int]:
    """Tokens of each prompt in the next step, given what each has left, oldest first; `budget` tokens at most.

    Prompts of one kind come first come, first served. Where both are there short ones come first, but for the long ones' share; and
    the long ones fill up half of the budget only, so that the short ones' step, and the next, are over soon.
    """
    is_short = [tokens <= short_tokens(budget) for tokens in remaining]
    mixed = len({short for short, tokens in zip(is_short, remaining, strict=True) if tokens}) == 2
    if not mixed:
        return _fill(remaining, budget)
    long_share = max(1, budget // LONG_SHARE)
    shorts = _fill([tokens if short else 0 for tokens, short in zip(remaining, is_short, strict=True)], budget - long_share)
    room = max(long_share, budget // 2 - sum(shorts))
    longs = _fill([0 if short else tokens for tokens, short in zip(remaining, is_short, strict=True)], room)
    return [short + long for short, long in zip(shorts, longs, strict=True)]


def _fill(remaining: Sequence[int], budget: int) -> list[int]:
    shares = []
    for tokens in remaining:
        shares.append(min(tokens, budget))
        budget -= shares[-1]
    return shares
