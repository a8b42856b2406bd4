"""Recipes: functions that return complete configs. `openmimo VERB RECIPE` runs the function named after the verb."""
