"""RULER niah_multikey_3: one UUID -> UUID among others; there is no other text."""

from openmimo.evals.tasks._retrieval import Retrieval, retrieval_task

PLUGIN = retrieval_task(Retrieval("needles", uuid_keys=True, uuid_values=True))
