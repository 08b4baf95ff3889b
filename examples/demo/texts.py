"""Real text that is on every machine with Python: the language reference that `help()` prints.

Documents are long, different from their first line on, and the same on every run of one Python
version, so that a run can be repeated and no document is a prefix of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

DOCUMENT_CHARACTERS = 9000  # about 2500 tokens of SmolLM2

_QUESTIONS = {
    "types": "What are the built-in types of the Python language for?",
    "formatstrings": "How is a value formatted with a format string?",
    "debugger": "How do I set a breakpoint in the Python debugger?",
    "attribute-access": "When is the method __getattr__ called?",
    "compound": "What does the else clause of a loop do?",
    "string-methods": "How do I join strings in Python?",
    "execmodel": "How are names resolved in Python?",
}
_WARM_UP_TOPIC = "specialnames"
_CONVERSATION_TOPIC = "import"
_TURNS = (
    "In one sentence, what does this document describe?",
    "Where does Python look for a module that is imported?",
    "What happens when the module is not found?",
    "Give a short example of an import statement.",
)
_ROUTED_TOPIC = "assignment"
_ROUTED_TURNS = {
    "A": (
        "In one sentence, what does this document describe?",
        "What is an augmented assignment?",
        "What may stand on the left side of an assignment?",
        "Give a short example with a list.",
    ),
    "B": (
        "What is an annotated assignment?",
        "Is its annotation evaluated?",
        "Give a short example of one.",
    ),
}


@dataclass(frozen=True, slots=True)
class Document:
    """A long prompt with a question at its end."""

    title: str
    prompt: str


def documents(count: int) -> list[Document]:
    """`count` different documents, each ending with a question about it."""
    assert count <= len(_QUESTIONS), f"there are {len(_QUESTIONS)} documents"
    return [
        Document(title, f"{_cut(topics[title])}\n\nQuestion: {question}\nAnswer:")
        for title, question in list(_QUESTIONS.items())[:count]
    ]


def warm_up() -> str:
    """A text that is in no document, to pay for what an engine does only once."""
    return _cut(topics[_WARM_UP_TOPIC], 3000)


def conversation() -> tuple[str, tuple[str, ...]]:
    """What the model is told first, and what a user then asks, turn by turn."""
    return f"Answer from this document.\n\n{_cut(topics[_CONVERSATION_TOPIC], 5000)}", _TURNS


def routed_conversations() -> tuple[str, dict[str, tuple[str, ...]]]:
    """A system prompt, and the questions of the conversations that begin with it, by name."""
    return f"Answer from this document.\n\n{_cut(topics[_ROUTED_TOPIC], 6000)}", _ROUTED_TURNS


def _cut(text: str, characters: int = DOCUMENT_CHARACTERS) -> str:
    """The beginning of the text, ended at a paragraph."""
    assert len(text) >= characters, f"a text of {len(text)} characters is too short"
    end = text.rfind("\n\n", 0, characters)
    return text[: end if end > 0 else characters].strip()
