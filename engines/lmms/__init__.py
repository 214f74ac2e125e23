"""lmms-eval asks our pipelines the questions of its benchmarks, and its results become a table.

    lmms-eval --model earlytom --model_args bundle=bundles/ov7b --tasks videomme --output_path results

lmms-eval finds the model by an entry point (`manifest.py`). Only `model.py` and `manifest.py` import its package.
"""
