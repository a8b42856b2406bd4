"""RULER niah_single_1: one word -> number in a repeated line."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("noise"))
