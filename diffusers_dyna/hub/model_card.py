# SPDX-License-Identifier: Apache-2.0
"""Model cards: what a saved pipeline and the run that trained it say about themselves, and nothing beyond that."""

import inspect
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError, safe_open

from diffusers import DiffusionPipeline, pipelines
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import ModelCard, ModelCardData

import diffusers_dyna


SUMMARY_NAME = "training_summary.json"
MAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")
# What a card can be told, by the training summary or by `facts`, with the JSON type of each.
FACTS = {
    "args": (dict,),
    "budget": (int, float),
    "citation": (str,),
    "commit": (str,),
    "compute_ratio": (int, float),
    "dataset": (dict,),
    "ema_decay": (int, float),
    "final_loss": (int, float),
    "hardware": (str,),
    "images_seen": (int,),
    "limits": (list,),
    "objective": (str,),
    "results": (list,),
    "sample_grid": (dict,),
    "seed": (int,),
    "steps": (int,),
    "text_encoder": (dict,),
    "train_batch_size": (int,),
    "train_hours": (int, float),
    "versions": (dict,),
}
# What the pipelines of other tasks than drawing from nothing, a class or a text do, and their tag.
IMAGE_TASKS = {
    "DynaDiTImg2ImgPipeline": ("redraws images", "image-to-image"),
    "DynaDiTInpaintPipeline": ("paints the masked part of images", "inpainting"),
    "DynaDiTUpscalePipeline": ("enlarges images", "super-resolution"),
}
# Arguments for which the example of a card reads a picture of the user's.
INPUT_PICTURES = {
    "image": ("image.png", "your picture"),
    "mask_image": ("mask.png", "white where to paint"),
}
# Of a dynamic transformer, as the training script draws them.
ACTIVITY_PICTURES = {
    "activity.png": "Heads, channel groups and tokens that are on, over timestep and layer",
    "tokens.png": "Tokens that take the MLP, over the image; darker for more layers",
}
OBJECTIVES = {
    "flow": "flow matching: the model predicts the velocity `noise - data`",
    "epsilon": "denoising diffusion: the model predicts the noise",
}
# By `prediction_type` of a flow's scheduler.
PREDICTIONS = {"velocity": "the velocity", "epsilon": "the noise", "score": "the score", "sample": "the data"}
# The papers that the docstrings of our models name. Those of another objective than the model's are left out.
PAPERS = {
    "2210.02747": (
        "flow",
        """@inproceedings{lipman2023flow,
  title = {Flow Matching for Generative Modeling},
  author = {Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt},
  booktitle = {International Conference on Learning Representations},
  year = {2023}
}""",
    ),
    "2006.11239": (
        "epsilon",
        """@inproceedings{ho2020denoising,
  title = {Denoising Diffusion Probabilistic Models},
  author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}""",
    ),
    "2207.12598": (
        None,
        """@article{ho2022classifier,
  title = {Classifier-Free Diffusion Guidance},
  author = {Ho, Jonathan and Salimans, Tim},
  journal = {arXiv preprint arXiv:2207.12598},
  year = {2022}
}""",
    ),
    "2212.09748": (
        None,
        """@inproceedings{peebles2023scalable,
  title = {Scalable Diffusion Models with Transformers},
  author = {Peebles, William and Xie, Saining},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023}
}""",
    ),
    "2410.03456": (
        None,
        """@inproceedings{zhao2025dynamic,
  title = {Dynamic Diffusion Transformer},
  author = {Zhao, Wangbo and Han, Yizeng and Tang, Jiasheng and Wang, Kai and Song, Yibing and Huang, Gao and Wang, Fan and You, Yang},
  booktitle = {International Conference on Learning Representations},
  year = {2025}
}""",
    ),
}


@dataclass(frozen=True)
class PipelineFolder:
    """
    A folder that `save_pretrained` wrote, checked to be complete.

    Args:
        path (`Path`): the folder, absolute.
        index (`dict`): `model_index.json`.
        pipeline_class (`type`): the pipeline's class in this package.
        components (`dict[str, tuple[str, str]]`): library and class name of each component that is not None.
        own_classes (`dict[str, type]`): class of each component that this package defines.
        summary (`dict`): `training_summary.json`, empty without one.
    """

    path: Path
    index: dict
    pipeline_class: type
    components: dict[str, tuple[str, str]]
    own_classes: dict[str, type]
    summary: dict

    def config(self, name: str) -> dict:
        """The `config.json` of a component, empty for components that have none."""
        file = self.path / name / "config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a class-conditional model, else None."""
        return next(filter(None, (self.config(name).get("num_classes") for name in self.own_classes)), None)

    @property
    def has_text_encoder(self) -> bool:
        return any(name.startswith("text_encoder") for name in self.components)

    @property
    def image_task(self) -> tuple[str, str] | None:
        """What a pipeline that is given an image does with it, and the tag of that; else None."""
        return IMAGE_TASKS.get(self.pipeline_class.__name__)


def read_pipeline_folder(pipeline_dir: str | Path) -> PipelineFolder:
    """
    Reads what a folder holds, without loading weights.

    Args:
        pipeline_dir (`str` or `Path`): folder written by `save_pretrained` of a pipeline of this package.

    Returns:
        [`PipelineFolder`].

    Raises:
        `ValueError`: where the folder is missing, holds no pipeline of this package, or lacks a part of it.
    """
    path = Path(pipeline_dir).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(
            f"`pipeline_dir`={str(pipeline_dir)!r} is not a folder. Give the folder that `save_pretrained` of a "
            "pipeline wrote."
        )
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"`pipeline_dir`={str(pipeline_dir)!r} holds no pipeline: it has no `model_index.json`. Give the folder "
            "that `save_pretrained` of a pipeline wrote."
        )
    index = _read_json(path / "model_index.json")
    class_name = index.get("_class_name")
    pipeline_class = getattr(diffusers_dyna, class_name, None) if isinstance(class_name, str) else None
    if not (inspect.isclass(pipeline_class) and issubclass(pipeline_class, DiffusionPipeline)):
        known = [
            name
            for name in diffusers_dyna.__all__
            if inspect.isclass(getattr(diffusers_dyna, name))
            and issubclass(getattr(diffusers_dyna, name), DiffusionPipeline)
        ]
        raise ValueError(
            f"`pipeline_dir`={str(pipeline_dir)!r} holds a pipeline of class {class_name!r}, but only those of "
            f"diffusers_dyna can be published: {', '.join(known)}. Save it from one of these classes."
        )

    components, own_classes = {}, {}
    parameters = inspect.signature(pipeline_class.__init__).parameters
    for name, record in index.items():
        if name not in parameters or not isinstance(record, list) or len(record) != 2 or record == [None, None]:
            continue
        optional_setting = parameters[name].default is not inspect.Parameter.empty
        if optional_setting and name not in pipeline_class._optional_components and not (path / name).is_dir():
            continue  # a setting that is a list of two
        components[name] = tuple(record)
        _check_component(path, name, *components[name])
        if record[0].split(".")[0] == "diffusers_dyna":
            own_classes[name] = getattr(diffusers_dyna, record[1])

    summary = _read_json(path / SUMMARY_NAME) if (path / SUMMARY_NAME).is_file() else {}
    return PipelineFolder(path, index, pipeline_class, components, own_classes, summary)


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{file.name}` in `pipeline_dir` is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{file.name}` in `pipeline_dir` must hold a JSON object, but holds a {type(content)}.")
    return content


def _check_component(path: Path, name: str, library: str, class_name: str) -> None:
    if library.split(".")[0] == "diffusers_dyna":
        if not hasattr(diffusers_dyna, class_name):
            raise ValueError(
                f"Component `{name}` of `pipeline_dir` is a {class_name!r}, which this version of diffusers_dyna "
                "does not have. Install the version that saved it."
            )
    elif library not in LOADABLE_CLASSES and not hasattr(pipelines, library):
        raise ValueError(
            f"Component `{name}` of `pipeline_dir` is recorded as {library}.{class_name}, which nobody else can load. "
            "Use a class of diffusers_dyna, diffusers or transformers, and save the pipeline again."
        )
    folder = path / name
    if not folder.is_dir():
        raise ValueError(f"`pipeline_dir` has no folder `{name}`, which `model_index.json` names. Save it again.")
    if (folder / "config.json").is_file():
        weights = {file.name for file in folder.glob("*.safetensors")}
        for file in sorted(weights):
            try:
                safe_open(folder / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"`{name}/{file}` in `pipeline_dir` is no complete safetensors file ({error}). Save the pipeline "
                    "again."
                ) from error
        if not weights:
            raise ValueError(f"`{name}` in `pipeline_dir` has no `.safetensors` weights. Save the pipeline again.")
        for weight_index in folder.glob("*.safetensors.index*.json"):
            missing = sorted(set(_read_json(weight_index)["weight_map"].values()) - weights)
            if missing:
                raise ValueError(f"`{name}` in `pipeline_dir` lacks the weights {missing}. Save the pipeline again.")


def create_model_card(
    pipeline_dir: str | Path,
    repo_id: str,
    *,
    facts: dict | None = None,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    base_model: str | list[str] | None = None,
    tags: list[str] | None = None,
    pipeline_tag: str | None = None,
    remote_code_revision: str = "remote-code",
) -> ModelCard:
    """
    Writes the model card of a saved pipeline. What is not known is not mentioned.

    Args:
        pipeline_dir (`str` or `Path`):
            Folder of the pipeline. Its `training_summary.json`, if any, tells how the model was trained.
        repo_id (`str`): repository that the card is for, `"owner/name"`; the code in the card loads from it.
        facts (`dict`, *optional*):
            Facts that replace or extend those of `training_summary.json`, with the same keys, and three more: `limits`
            (list of sentences), `citation` (BibTeX of this very model) and `text_encoder` (`name`, `url`, `license` and
            `max_sequence_length`; without it, what the script's arguments tell).
        license (`str`, *optional*): licence of the weights, as the Hub names it (`"apache-2.0"`).
        datasets (`str` or `list[str]`, *optional*): ids on the Hub of the training data.
        base_model (`str` or `list[str]`, *optional*): id on the Hub of the model that this one was trained from.
        tags (`list[str]`, *optional*): further tags.
        pipeline_tag (`str`, *optional*):
            Task as the Hub names it. `None` is `"image-to-image"` for a pipeline that is given an image,
            `"text-to-image"` for another one with a text encoder, and `"unconditional-image-generation"`, the Hub's
            name for class-conditional models too, for the others.
        remote_code_revision (`str`, defaults to `"remote-code"`):
            Branch or commit of the repository that holds the code of the classes. A commit is called pinned.

    Returns:
        [`~huggingface_hub.ModelCard`]: `str(card)` is the content of README.md.

    Raises:
        `ValueError`: where the folder holds no pipeline, or a fact is unknown or of the wrong type.
    """
    folder = read_pipeline_folder(pipeline_dir)
    facts = gather_facts(folder, facts)
    objective = facts.get("objective")
    if objective is None and "FlowMatch" in folder.components.get("scheduler", ("", ""))[1]:
        objective = "flow"

    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=pipeline_tag or _pipeline_tag(folder),
        tags=_tags(folder, objective, tags),
        datasets=_as_list(datasets) or _hub_dataset(facts.get("dataset", {})),
        base_model=base_model,
    )
    arguments = facts.get("args", {})
    text_encoder = {
        "name": arguments.get("text_encoder"),
        "max_sequence_length": arguments.get("max_sequence_length"),
        **facts.get("text_encoder", {}),
    }
    sections = [
        f"# {repo_id.split('/')[-1]}\n\n{_description(folder, objective, text_encoder)}",
        _loading(folder, repo_id, remote_code_revision, facts.get("sample_grid", {})),
        _samples(facts.get("sample_grid", {})),
        _activity(folder),
        _training(folder, facts),
        _results(facts.get("results", [])),
        _limits(folder, facts),
        _citation(folder, objective, facts.get("citation")),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _pipeline_tag(folder: PipelineFolder) -> str:
    if folder.image_task is not None:
        return "image-to-image"
    return "text-to-image" if folder.has_text_encoder else "unconditional-image-generation"


def gather_facts(folder: PipelineFolder, facts: dict | None) -> dict:
    """
    Joins the training summary and the facts of the caller, and checks them.

    Args:
        folder ([`PipelineFolder`]): the pipeline.
        facts (`dict`, *optional*): facts that replace those of the summary; a value of None removes one.

    Returns:
        `dict`: the facts that have a value, without local paths and secrets.

    Raises:
        `ValueError`: on an unknown fact, or one of the wrong type.
    """
    unknown = sorted(set(facts or {}) - set(FACTS))
    if unknown:
        raise ValueError(f"`facts` has the unknown keys {unknown}. Known keys: {', '.join(FACTS)}.")
    known = {key: value for key, value in {**folder.summary, **(facts or {})}.items() if key in FACTS}
    known = {key: value for key, value in known.items() if value not in (None, "", [], {})}
    for key, value in known.items():
        if not isinstance(value, FACTS[key]):
            raise ValueError(
                f"The fact `{key}`={value!r} (`facts` or `{SUMMARY_NAME}`) has type {type(value).__name__}, expected "
                f"{' or '.join(expected.__name__ for expected in FACTS[key])}."
            )
    if known.get("objective", "flow") not in OBJECTIVES:
        raise ValueError(f"The fact `objective`={known['objective']!r} must be one of {', '.join(OBJECTIVES)}.")
    if not all(isinstance(row, dict) for row in known.get("results", [])):
        raise ValueError("The fact `results` must be a list of objects with the keys metric, value, num_samples, ...")
    as_written = ("citation", "limits")  # prose of the user
    return {key: value if key in as_written else without_local_paths(value) for key, value in known.items()}


def without_local_paths(value):
    """
    Makes script arguments fit to be shown: of a path only its last part stays, and what is a secret goes.

    Args:
        value (`Any`): any JSON value. Entries of a `dict` that are None or a secret are left out.

    Returns:
        A copy of the value.
    """
    if isinstance(value, dict):
        shown = {}
        for key, entry in value.items():
            secret = re.search(r"^(hub_|hf_)?token$|password|secret|api_key", str(key).lower()) or (
                isinstance(entry, str) and re.match(r"hf_[A-Za-z0-9]{16}", entry)
            )
            if entry is not None and not secret:
                shown[key] = without_local_paths(entry)
        return shown
    if isinstance(value, (list, tuple)):
        return [without_local_paths(entry) for entry in value]
    if isinstance(value, str):
        value = re.sub(r"^file://", "", value)
        if re.match(r"([A-Za-z]:|~)?\\|[A-Za-z]:/", value):
            return PureWindowsPath(value).name
        if value.startswith(("/", "~")):
            return PurePosixPath(value).name
        # Paths inside a longer string (`key=/a/b`, `/a:/b`); a slash after a word or a scheme is none.
        return re.sub(r"(?<![\w/:.~-])(?:~|/)(?:[^\s'\",;:=]*/)([^\s'\",;:=/]*)", r"\1", value)
    return value


def _as_list(value) -> list | None:
    return [value] if isinstance(value, str) else value


def _number(value) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(rows: list[list], header: list[str]) -> str:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _tags(folder: PipelineFolder, objective: str | None, tags: list[str] | None) -> list[str]:
    own = ["diffusers", "diffusers-dyna"]
    if objective == "flow":
        own.append("flow-matching")
    if any("DiT" in cls.__name__ for cls in folder.own_classes.values()):
        own.append("dynamic-dit")
    if folder.num_classes:
        own.append("class-conditional")
    if folder.image_task is not None and folder.image_task[1] != _pipeline_tag(folder):
        own.append(folder.image_task[1])
    return own + [tag for tag in tags or [] if tag not in own]


def _hub_dataset(dataset: dict) -> list[str] | None:
    """The id of a dataset on the Hub. A name alone may be anything, so that its address has to tell."""
    match = re.match(
        r"https://(?:huggingface\.co|hf\.co)/datasets/([\w.-]+(?:/[\w.-]+)?)/?$", dataset.get("url") or ""
    )
    return [match[1]] if match else None


def _image_size(folder: PipelineFolder) -> str | None:
    """Height x width of the images, where the model works on pixels."""
    if "vae" in folder.components:
        return None
    sizes = [size for name in folder.own_classes if (size := folder.config(name).get("sample_size")) is not None]
    if not sizes:
        return None
    height, width = (sizes[0], sizes[0]) if isinstance(sizes[0], int) else sizes[0]
    return f"{height} x {width}"


def _parameter_count(folder: Path) -> tuple[int, str] | None:
    """Number and type of the weights of a component, read from the headers of its safetensors files."""
    count, dtypes = 0, Counter()
    for file in sorted(folder.glob("*.safetensors")):
        if MAIN_WEIGHTS.fullmatch(file.name):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    size = math.prod(tensors.get_slice(key).get_shape())
                    count += size
                    dtypes[tensors.get_slice(key).get_dtype()] += size
    return (count, dtypes.most_common(1)[0][0]) if count else None


def _objective(folder: PipelineFolder, objective: str) -> str:
    file = folder.path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    path, prediction = config.get("path", "linear"), config.get("prediction_type", "velocity")
    if objective == "flow" and (path, prediction) != ("linear", "velocity") and prediction in PREDICTIONS:
        return f"flow matching on the path `{path}`: the model predicts {PREDICTIONS[prediction]}"
    return OBJECTIVES[objective]


def _description(folder: PipelineFolder, objective: str | None, text_encoder: dict) -> str:
    size, num_classes = _image_size(folder), folder.num_classes
    does = folder.image_task[0] if folder.image_task is not None else "draws images"
    if factor := folder.index.get("upscale_factor"):
        does += f" {factor} times"
    if size:
        does += f" {'to' if factor else 'of'} {size} pixels"
    if folder.has_text_encoder:
        does += " from a text" if folder.image_task is None else " as a text says"
    elif num_classes:
        does += f" of {num_classes:,} classes"
    text = f"A [diffusers](https://github.com/huggingface/diffusers) pipeline that {does}"
    text += f" by {_objective(folder, objective)}." if objective else "."

    rows = []
    for name, (_, class_name) in folder.components.items():
        details = []
        if parameters := _parameter_count(folder.path / name):
            details.append(f"{parameters[0]:,} parameters ({parameters[1]})")
        if name in folder.own_classes and folder.config(name).get("sample_size") is not None and size is None:
            details.append(f"sample size {folder.config(name)['sample_size']}")
        if name == "text_encoder":
            config = folder.config(name)
            if width := config.get("hidden_size") or config.get("d_model"):
                details.append(f"hidden states of {width} channels")
        rows.append([f"`{name}`", f"`{class_name}`", ", ".join(details)])
    text += "\n\n" + _table(rows, ["Component", "Class", "Size"])

    if folder.has_text_encoder and text_encoder["name"]:
        name, url = text_encoder["name"], text_encoder.get("url") or ""
        text += "\n\nThe text encoder is " + (f"[{name}]({url})" if url.startswith("https://") else name)
        if text_encoder.get("license"):
            text += f", licence {text_encoder['license']}"
        if text_encoder["max_sequence_length"]:
            text += f"; captions had at most {text_encoder['max_sequence_length']} tokens in training"
        text += "."

    names = folder.index.get("id2label")
    if isinstance(names, dict) and 0 < len(names) <= 20:
        text += "\n\nClasses: " + ", ".join(
            name if name == label else f"{label} = {name}" for label, name in names.items()
        )
        text += "."
    elif names:
        text += f"\n\nThe names of the {len(names):,} classes are in `pipe.config.id2label`."
    return text


def _example_call(folder: PipelineFolder, grid: dict) -> str:
    """Arguments of a call of the pipeline that runs, with the settings of the sample grid where they are known."""
    parameters = inspect.signature(folder.pipeline_class.__call__).parameters
    arguments = [f"{name}={name}" for name in INPUT_PICTURES if name in parameters]
    config = folder.config("transformer")
    has_null_class = config.get("num_classes") is None or config["class_dropout_prob"] > 0
    has_prompt = folder.has_text_encoder and "prompt" in parameters
    has_labels = folder.num_classes and "class_labels" in parameters and not (has_prompt and has_null_class)
    if has_prompt:
        arguments.append('prompt="a lighthouse on a cliff"')
    if has_labels:
        labels: list = list(range(1 if folder.image_task is not None else min(2, folder.num_classes)))
        names = folder.index.get("id2label") or {}
        shared = Counter(part.strip() for name in names.values() for part in name.split(","))
        if all("," not in names.get(str(label), ",") and shared[names[str(label)].strip()] == 1 for label in labels):
            labels = [names[str(label)] for label in labels]
        arguments.append(f"class_labels={json.dumps(labels, ensure_ascii=False)}")
    for name in ("num_inference_steps", "guidance_scale"):
        if name in parameters and isinstance(grid.get(name), (int, float)):
            arguments.append(f"{name}={grid[name]}")
        elif name == "guidance_scale" and parameters[name].default > 1:  # that of a pipeline with text
            can_guide = (has_prompt or has_labels) and config["caption_dropout_prob"] > 0 and has_null_class
            arguments += [] if can_guide else ["guidance_scale=1.0"]
    arguments.append(f"generator=torch.Generator().manual_seed({int(grid.get('seed') or 0)})")
    return "\n".join(f"    {argument}," for argument in arguments)


def _loading(folder: PipelineFolder, repo_id: str, remote_code_revision: str, grid: dict) -> str:
    class_name = folder.pipeline_class.__name__
    call = _example_call(folder, grid)
    pictures = "".join(
        f'{name} = load_image("{file}")  # {what}\n'
        for name, (file, what) in INPUT_PICTURES.items()
        if name in inspect.signature(folder.pipeline_class.__call__).parameters
    )
    load_image = "from diffusers.utils import load_image\n" if pictures else ""
    draw = (
        'pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f"{pictures}images = pipe(\n{call}\n).images\n"
        'images[0].save("sample.png")'
    )
    parts = ", ".join(
        f'`{cls.__name__}.from_pretrained("{repo_id}", subfolder="{name}")`'
        for name, cls in folder.own_classes.items()
    )
    pinned = re.fullmatch(r"[0-9a-f]{40}", remote_code_revision) is not None
    if pinned:
        advice = "The revision pins the code to the commit that was published with this card. Keep it pinned"
    else:
        advice = (
            f"`{remote_code_revision}` is a branch: whatever is pushed to it later will run on your machine. Pin it to "
            "a commit, which the card on `main` and the history of the branch show"
        )
    requirement = next(
        (line for line in metadata.requires("diffusers-dyna") or [] if re.match(r"diffusers\b", line)), "diffusers"
    )
    return f"""## How to use

With the package `diffusers-dyna`:

```python
import torch
{load_image}from diffusers_dyna import {class_name}

pipe = {class_name}.from_pretrained("{repo_id}")
{draw}
```

After `import diffusers_dyna`, `DiffusionPipeline.from_pretrained("{repo_id}")` gives the same. Parts load on their own: {parts}.

Without the package, with `{requirement}` and the code in this repository:

```python
import torch
from diffusers import DiffusionPipeline
{load_image}
pipe = DiffusionPipeline.from_pretrained(
    "{repo_id}",
    revision="{remote_code_revision}",
    trust_remote_code=True,
)
{draw}
```

`trust_remote_code=True` runs the Python files of that revision (licence Apache-2.0). {advice}, and read the files first."""


def _samples(grid: dict) -> str:
    if not grid.get("file"):
        return ""
    settings = [
        f"{label} {_number(grid[key])}"
        for key, label in (
            ("seed", "seed"),
            ("guidance_scale", "guidance scale"),
            ("num_inference_steps", "inference steps"),
            ("scheduler", "scheduler"),
        )
        if grid.get(key) is not None
    ]
    caption = f"\n\nDrawn with {', '.join(settings)}." if settings else ""
    return f"## Samples\n\n![Samples](./{Path(grid['file']).name}){caption}"


def _activity(folder: PipelineFolder) -> str:
    """The pictures of what the routers leave on, where the training script has drawn them."""
    shown = [
        f"![{caption}](./{name})\n\n{caption}."
        for name, caption in ACTIVITY_PICTURES.items()
        if (folder.path / name).is_file()
    ]
    return "## What is computed when\n\n" + "\n\n".join(shown) if shown else ""


def _training(folder: PipelineFolder, facts: dict) -> str:
    rows = []
    dataset = facts.get("dataset", {})
    if dataset.get("name"):
        name = dataset["name"]
        url = dataset.get("url") or ""
        text = f"[{name}]({url})" if url.startswith(("https://", "http://")) else name
        for key, form in (("num_images", "{} images"), ("num_classes", "{} classes"), ("license", "licence {}")):
            if dataset.get(key) is not None:
                text += ", " + form.format(_number(dataset[key]))
        rows.append(["Data", text])
    if "objective" in facts:
        rows.append(["Objective", _objective(folder, facts["objective"])])
    for key, label in (
        ("steps", "Optimiser steps"),
        ("train_batch_size", "Batch size (all processes and accumulation)"),
        ("images_seen", "Images seen"),
        ("budget", "Budget (share of the blocks' compute)"),
        ("compute_ratio", "Compute ratio reached, on training images"),
        ("final_loss", "Final loss"),
        ("ema_decay", "EMA decay"),
    ):
        if key in facts:
            rows.append([label, _number(facts[key])])
    if "seed" in facts:
        rows.append(["Seed", str(facts["seed"])])
    if "hardware" in facts:
        rows.append(["Hardware", facts["hardware"]])
    if "train_hours" in facts:
        rows.append(["Hours", _number(facts["train_hours"])])
    if "commit" in facts:
        rows.append(["Commit of the code", f"`{facts['commit']}`"])
    if "versions" in facts:
        rows.append(["Versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())])
    text = _table(rows, ["Fact", "Value"]) if rows else ""
    if arguments := facts.get("args"):
        listing = json.dumps(arguments, indent=2, ensure_ascii=False, default=str)
        text += f"\n\n<details>\n<summary>All arguments</summary>\n\n```json\n{listing}\n```\n\n</details>"
    return f"## Training\n\n{text.strip()}" if text else ""


def _results(results: list[dict]) -> str:
    """Metrics with what is needed to compare them; further keys, such as a compute ratio, become columns too."""
    if not results:
        return ""
    labels = {"metric": "Metric", "value": "Value", "num_samples": "Samples", "protocol": "Protocol"}
    keys = [key for key in labels if any(row.get(key) is not None for row in results)]
    for row in results:
        keys += [key for key in row if key not in keys and row[key] is not None]
    rows = [["" if row.get(key) is None else _number(row[key]) for key in keys] for row in results]
    return "## Results\n\n" + _table(rows, [labels.get(key, key.replace("_", " ").capitalize()) for key in keys])


def _limits(folder: PipelineFolder, facts: dict) -> str:
    limits = []
    size, num_classes = _image_size(folder), folder.num_classes
    if size:
        limits.append(f"Trained for images of {size} pixels; at other sizes quality is not to be expected.")
    if num_classes and not folder.has_text_encoder:
        limits.append(f"Draws its {num_classes:,} classes and nothing else.")
    if facts.get("dataset", {}).get("name"):
        limits.append(f"Shows what {facts['dataset']['name']} shows, with its gaps and biases.")
    limits += facts.get("limits", [])
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits) if limits else ""


def _citation(folder: PipelineFolder, objective: str | None, citation: str | None) -> str:
    named = []
    for cls in folder.own_classes.values():
        if cls.__name__ != folder.components.get("scheduler", ("", ""))[1]:
            named += re.findall(r"huggingface\.co/papers/(\d{4}\.\d{4,5})", cls.__doc__ or "")
    entries, links = [citation.strip()] if citation else [], []
    for paper in dict.fromkeys(named):
        paper_objective, bibtex = PAPERS.get(paper, (None, None))
        if paper_objective is not None and objective is not None and paper_objective != objective:
            continue
        links.append(f"[arXiv {paper}](https://huggingface.co/papers/{paper})")
        if bibtex:
            entries.append(bibtex)
    text = f"The model builds on {', '.join(links)}." if links else ""
    if entries:
        text += "\n\n```bibtex\n" + "\n\n".join(entries) + "\n```"
    return f"## Citation\n\n{text.strip()}" if text else ""
