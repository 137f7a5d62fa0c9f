"""Instructions: how a task becomes the prefix of a query (paper, section 3.2).

Queries carry `Instruct: {instruction}\\nQuery: {query}`; documents are never changed.
"""

QUERY_TEMPLATE = "Instruct: {instruction}\nQuery: "

# The two symmetric task types have one fixed instruction each (paper, table 16).
STS_INSTRUCTION = "Retrieve semantically similar text."
BITEXT_INSTRUCTION = "Retrieve parallel sentences."

TASK_TYPES = ("short_long", "long_short", "short_short", "long_long", "sts", "bitext")


def query_prompt(instruction: str | None) -> str:
    """Return the text that stands before a query: empty without an instruction."""
    return QUERY_TEMPLATE.format(instruction=instruction) if instruction else ""


def format_query(query: str, instruction: str | None = None) -> str:
    """Join an instruction and a query as the model reads them.

    >>> format_query("how tall is K2", "Given a question, retrieve passages that answer it")
    'Instruct: Given a question, retrieve passages that answer it\\nQuery: how tall is K2'
    """
    return query_prompt(instruction) + query
