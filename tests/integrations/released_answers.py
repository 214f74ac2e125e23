"""What the released code answers, in its own package. Arguments: SOURCE FRAMES OUT inner|none RATIO...

test_released_code.py runs this with an interpreter that has transformers 4.51.3. The package is called earlytom as ours
is, so nothing of ours is imported. Of it nothing is replaced but where its tower's weights come from.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import types
from pathlib import Path

SOURCE, FRAMES, OUT, MERGING, *RATIOS = sys.argv[1:]
GOLDEN = Path(__file__).parents[1] / "golden" / "e2e"
TINY = GOLDEN / "tiny-llava-onevision"
os.environ |= {"WRAPPER": "earlytom", "T": "0.5", "M": "6", "EMA": "0.9", "PRUNE_LAYERS": "1,3,4", "D": "0"}
if MERGING == "inner":
    os.environ |= {"INNER_k": "3", "INNER_r": "0.5"}
sys.path[:0] = [SOURCE, f"{SOURCE}/LLaVA-NeXT"]
sys.modules["ipdb"] = types.SimpleNamespace(set_trace=None)  # a debugger that it imports and never calls
llava = types.ModuleType("llava")  # its __init__.py imports a model of every family
llava.__path__ = [f"{SOURCE}/LLaVA-NeXT/llava"]
sys.modules["llava"] = llava

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

encoder = importlib.import_module("llava.model.multimodal_encoder.siglip_encoder")
qwen = importlib.import_module("llava.model.language_model.llava_qwen")
released = importlib.import_module("earlytom")
if not str(released.__file__).startswith(SOURCE):
    raise SystemExit(f"{released.__file__} is not the released code")
read = encoder.SigLipVisionModel.from_pretrained.__func__
encoder.SigLipVisionModel.from_pretrained = classmethod(lambda cls, name, **_: read(cls, TINY / name))
model = qwen.LlavaQwenForCausalLM(qwen.LlavaQwenConfig(**json.loads((TINY / "config.json").read_text())))
model.load_state_dict(load_file(TINY / "model.safetensors"))
released.earlytom(model.eval().requires_grad_(False))
with np.load(GOLDEN / "e2e.npz") as archive:
    prompt = torch.tensor([json.loads(str(archive["meta"]))[3]["prompt"]])
found = {}
for number, clip in enumerate(torch.from_numpy(np.load(FRAMES))):
    pixels = (clip.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    for ratio in RATIOS:
        os.environ["RETAIN_RATIO"] = ratio
        with contextlib.redirect_stdout(io.StringIO()):
            answer = model.generate(
                prompt, images=[pixels], image_sizes=[(384, 384)], modalities=["video"], do_sample=False,
                max_new_tokens=8, return_dict_in_generate=True, output_logits=True,
            )
        found[f"{number}_{ratio}_ids"] = answer.sequences[0].numpy()
        found[f"{number}_{ratio}_logits"] = torch.cat(answer.logits).numpy()
np.savez(OUT, **found)
