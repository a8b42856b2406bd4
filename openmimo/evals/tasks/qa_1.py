"""RULER qa_1: a question of one hop over generated biographies, in place of SQuAD."""

from openmimo.evals.tasks._biographies import biography_task

PLUGIN = biography_task(hops=1)
