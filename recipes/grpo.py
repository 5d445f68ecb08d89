"""Prompts and rule rewards for recipes/grpo.yaml: to say again the word that was asked for."""

WORDS = ("tea", "bread", "coffee", "water", "music", "paper", "summer", "winter", "garden")


def prompts() -> list[dict[str, str]]:
    """Prompts, each with the word that is wanted as a further column."""
    return [{"prompt": f"please say {word}", "wanted": word, "verb": "say"} for word in WORDS] + [
        {"prompt": f"now write {word}", "wanted": word, "verb": "write"} for word in WORDS
    ]


def says_it(completions: list[str], wanted: list[str], **_: object) -> list[float]:
    """The share of a completion's words that are the wanted one."""
    return [
        text.split().count(word) / max(1, len(text.split()))
        for text, word in zip(completions, wanted, strict=True)
    ]


def brief(completions: list[str], verb: list[str], **_: object) -> list[float | None]:
    """Less for longer completions; asked to write, the model may take its time."""
    return [
        None if to == "write" else -len(text.split()) / 8
        for text, to in zip(completions, verb, strict=True)
    ]
