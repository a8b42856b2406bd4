"""RULER niah_single_3: one word -> UUID in text."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("text", uuid_values=True))
