"""GSM-Infinite, realistic set, hard: word problems of 2 to 10 operations among irrelevant statements (2502.05252)."""

from openmimo.evals.tasks._word_problems import word_problem_task

PLUGIN = word_problem_task("hard")
