"""Light retraining of a zipped network.

Read in this order: retrain.py (the public function), run.py (what a step does, and all that must survive a restart),
objective.py (what a task minimises: losses.py, features.py), balance.py (factors of the tasks), loaders.py (batches
without end), validation.py (best weights, early stopping), resume.py and checkpoint.py (the file a run goes on from).
"""
