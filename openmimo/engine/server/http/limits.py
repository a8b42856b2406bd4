"""Maximum sizes of the parts of a request, which make any request cheap to reject and bounded to serve.

Each limit is checked before the part is processed. The limits are wide: only a faulty or hostile client reaches one.
"""

LARGE_BODY_BYTES = 2**16  # larger bodies wait in a separate queue
VALUES = 2**19  # of a body: numbers, strings, lists and objects; mostly token ids
STRINGS = 2**17  # of a body, including field names
DEPTH = 64  # nesting of schemas and arguments
SCHEMA_VALUES = 2**14  # of one schema, or of the arguments of one call
TOOL_VALUES = 2**15  # total of all tools
TOOLS = 512
MESSAGES = 8192
PARTS = 2048  # of one message
CALLS = 256  # of one message
PROMPTS = 2048
CLIPS = 64  # recordings of one request
FORM_FIELDS = 64
FORM_FIELD_BYTES = 2**16
SPOKEN_CHARACTERS = 4096  # of a text that is spoken; OpenAI's limit
OPEN_SOUND_BYTES = 2**29  # decoded sound of all open requests; half an hour at 24 kHz is a third of it
STORED_SPEECH_BYTES = 2**26  # sound of earlier replies, which messages refer to
STORED_SPEECH_SECONDS = 3600
STRUCTURE_CHARACTERS = 2**17
STRUCTURE_RULES = 512  # grammar compilers recurse over rules, and a long chain of rules overflows their stack
SCHEMA_REFERENCES = 256
CHOICES = 4096
BIASES = 4096
LABELS = 64  # entries of metadata
LABEL_CHARACTERS = 4096
SHORT_CHARACTERS = 512  # names of models, users, sessions
STOP_CHARACTERS = 4096
DETOKENIZED_TOKENS = 2**18
TOKENIZED_TOKENS = 2**20
PASSAGE_CHARACTERS = 2**19  # of a text that cannot be split; tokenization takes about 200 bytes per character
REPLY_PROMPT_TOKENS = 2**22  # total of all replies to one request
SCORED_TOKENS = 2**21  # total of the log-probabilities of prompts, the likeliest tokens of each position included
UNREAD_DELTAS = 2**14  # of one request whose client does not read its reply
MESSAGE_CHARACTERS = 1000  # of an error
IGNORED_FIELDS = 64  # reported unknown fields of one request
PATH_CHARACTERS = 200  # of a reported field
REQUEST_ID_CHARACTERS = 128


def shortened(text: str, most: int = MESSAGE_CHARACTERS) -> str:
    """Return the text, reduced to its beginning and its end if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-(most // 4) :]}"
