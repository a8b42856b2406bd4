"""How large the parts of a request may be, so that any one request is cheap to refuse and bounded to serve.

Every limit holds before the part is processed. They are wide: a client that meets one is in error, or an attacker.
"""

LARGE_BODY_BYTES = 2**16  # larger bodies wait in a queue of their own
VALUES = 2**19  # of a body: numbers, texts, lists and objects; token ids are most of them
STRINGS = 2**17  # of a body, names of fields included
DEPTH = 64  # of what a client nests: schemas, arguments
SCHEMA_VALUES = 2**14  # of one schema, or of the arguments of one call
TOOL_VALUES = 2**15  # of all tools together
TOOLS = 512
MESSAGES = 8192
PARTS = 2048  # of one message
CALLS = 256  # of one message
PROMPTS = 2048
STRUCTURE_CHARACTERS = 2**17
STRUCTURE_RULES = 512  # compilers of grammars recurse over rules, and a long chain of them overflows their stack
SCHEMA_REFERENCES = 256
CHOICES = 4096
BIASES = 4096
LABELS = 64  # entries of metadata
LABEL_CHARACTERS = 4096
SHORT_CHARACTERS = 512  # names of models, users, sessions
STOP_CHARACTERS = 4096
DETOKENIZED_TOKENS = 2**18
TOKENIZED_TOKENS = 2**20
PASSAGE_CHARACTERS = 2**19  # without a place to cut it: tokenizing takes some 200 bytes a character
REPLY_PROMPT_TOKENS = 2**22  # of all replies to one request together
UNREAD_DELTAS = 2**14  # of one request whose client does not read them
MESSAGE_CHARACTERS = 1000  # of an error


def shortened(text: str, most: int = MESSAGE_CHARACTERS) -> str:
    """The text, or its beginning and its end where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-(most // 4) :]}"
