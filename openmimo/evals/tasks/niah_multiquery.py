"""RULER niah_multiquery: four words -> numbers in text, all of which are asked for."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("text", keys=4, queries=4))
