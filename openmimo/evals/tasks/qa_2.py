"""RULER qa_2: a question of two hops over generated biographies, in place of HotpotQA."""

from openmimo.evals.tasks._biographies import biography_task

PLUGIN = biography_task(hops=2)
