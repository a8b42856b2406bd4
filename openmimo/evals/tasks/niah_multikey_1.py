"""RULER niah_multikey_1: four words -> numbers in text, one of which is asked for."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("text", keys=4))
