"""RULER niah_single_2: one word -> number in text."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("text"))
