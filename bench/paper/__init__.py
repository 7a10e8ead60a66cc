"""The experiments of the Multi-Task Zipping paper (He, Zhou, Thiele, NeurIPS 2018) on data that can be had.

``python -m bench.paper NAME``. Read in this order: lenet_300_100.py, lenet_5.py (lenets.py), vgg_16.py and resnets.py
(an experiment each: networks, tasks, recipe), case.py (what an experiment is made of), methods.py (this library, its
ablations and the baselines; pruning.py), run.py, measure.py (errors and their standard error), table.py.
"""
