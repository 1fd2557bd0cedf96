"""A thought and an answer that come apart, as the one text that a model has written."""

OPEN, CLOSE = "<think>\n", "\n</think>\n\n"  # as R1, QwQ and Qwen3 write them


def join_thought(thought: str, answer: str, ended: bool) -> str:
    """Return a completion whose thought, if there is any, stands in one pair of tags.

    Args:
        thought: what a reasoning server returns besides the answer; "": nothing.
        answer: the content. If the server does not part the two and the prompt has opened the thought, the opening tag
            is missing in it, and is restored.
        ended: whether the model has ended the answer by itself; else a thought without an answer is left open.
    """
    if not thought.strip():
        before, close, _ = answer.partition(CLOSE.strip())
        return OPEN + answer if close and OPEN.strip() not in before else answer
    if not answer and not ended:
        return OPEN + thought.lstrip("\n")
    return OPEN + thought.strip("\n") + CLOSE + answer.lstrip("\n")
