"""RULER niah_multikey_2: one word -> number among others; there is no other text."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("needles"))
