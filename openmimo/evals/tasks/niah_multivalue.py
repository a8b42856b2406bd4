"""RULER niah_multivalue: four numbers of one word in text."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("text", values=4))
