"""What clients ask of a model where the stack does not say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.config import TrafficConfig
    from infra.plan.ledger import Ledger

PROMPT_TOKENS = 1155
"""Mean of 19,366 requests to Azure's conversation services (AzurePublicDataset, AzureLLMInferenceTrace_conv.csv of
November 2023; computed 2026-11; half of them are under 1,020)."""
ANSWER_TOKENS = 211
"""Mean of the same requests; half of them are under 129."""
UTILISATION = 0.5
"""In a week of that service (AzureLLMInferenceDataset2024: 27,303,995 requests from 12 to 18 May 2024) the mean of
2,709 a minute is 0.6 of the busiest hours' 4,500; and the busiest hours should leave a fifth of a fleet free."""
ANSWER_PART = 4
"""An answer is at most this part of the context."""


def request_tokens(
    model: str, wanted: TrafficConfig | None, context: int, max_answer: int | None, ledger: Ledger
) -> tuple[int, int]:
    """Tokens of a usual request: prompt, answer."""
    at = f"models.{model}.traffic"
    answer = wanted.answer_tokens if wanted else None
    prompt = wanted.prompt_tokens if wanted else None
    trace = "the mean of Azure's conversation traces of 2023"
    if answer is None:
        room = max(1, min(max_answer or context, context // ANSWER_PART, context - (prompt or 0)))
        answer = min(ANSWER_TOKENS, room)
        reason = trace if answer == ANSWER_TOKENS else f"{trace} is {ANSWER_TOKENS}, more than a usual answer here"
        ledger.because(f"{at}.answer-tokens", answer, reason)
    else:
        ledger.given(f"{at}.answer-tokens", answer)
    if prompt is None:
        prompt = min(PROMPT_TOKENS, max(1, context - answer))
        reason = trace if prompt == PROMPT_TOKENS else f"{trace} is {PROMPT_TOKENS}, too long for the context"
        ledger.because(f"{at}.prompt-tokens", prompt, reason)
    else:
        ledger.given(f"{at}.prompt-tokens", prompt)
    if prompt + answer > context:
        fix = f"`models.{model}.context: {prompt + answer}` or more, or smaller requests"
        problem = f"{prompt} tokens of prompt and {answer} of answer are more than the context of {context}"
        ledger.refuse(at, problem, fix)
    return prompt, answer


def requests_per_month(model: str, wanted: TrafficConfig | None, capacity: float, ledger: Ledger) -> int:
    """Requests in a month."""
    at = f"models.{model}.traffic.requests-per-month"
    if wanted and wanted.requests_per_month is not None:
        ledger.given(at, wanted.requests_per_month)
        return wanted.requests_per_month
    requests = max(1, int(capacity * UTILISATION))
    ledger.because(
        at,
        requests,
        f"{UTILISATION:.0%} of what the engines can do: the busiest hour has 1.7 times the mean, a fifth stays free",
    )
    return requests
