# SPDX-License-Identifier: Apache-2.0
"""Publishing a saved pipeline on the Hub, in the two forms in which it can be loaded."""

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .model_card import ACTIVITY_PICTURES, PipelineFolder, create_model_card, gather_facts, read_pipeline_folder


REMOTE_CODE_BRANCH = "remote-code"
# The only files of a component's folder that leave the machine.
WEIGHT_PATTERNS = ("diffusion_pytorch_model*.safetensors", "model*.safetensors", "*.safetensors.index*.json")
CONFIG_PATTERNS = ("config.json", "*_config.json")
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "*.model",
    "*.spm",
)
# Keys in which diffusers and transformers record where on this machine something was loaded from.
PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file")
LOGIN_ADVICE = "Log in with `hf auth login`, or set the environment variable `HF_TOKEN`"


@dataclass(frozen=True)
class PublishedPipeline:
    """
    What [`publish`] made.

    Args:
        repo_id (`str`): `"owner/name"`.
        url (`str`): page of the repository.
        commit (`str`): hash of the commit on `main`, for `from_pretrained(repo_id, revision=commit)`.
        remote_code_commit (`str`):
            Hash of the commit on the branch `remote-code`, for `DiffusionPipeline.from_pretrained(repo_id,
            revision=remote_code_commit, trust_remote_code=True)`.
    """

    repo_id: str
    url: str
    commit: str
    remote_code_commit: str


def check_can_publish(repo_id: str, token: str | None = None) -> str:
    """
    Checks that a repository could be written to, so that a long run does not end with an upload that fails. Creates
    and uploads nothing.

    Args:
        repo_id (`str`): `"owner/name"`, or `"name"` for a repository of the user that the token belongs to.
        token (`str`, *optional*): access token; `None` is the one that `hf auth login` or `HF_TOKEN` gave.

    Returns:
        `str`: the repository as `"owner/name"`.

    Raises:
        `ValueError`: on a name that is none, without a token, with a token that is invalid or may only read, and on an
            owner that the token's user cannot write to.
    """
    _check_repo_id(repo_id)
    if not (token or get_token()):
        raise ValueError(
            f"Publishing `{repo_id}` on the Hub needs an access token, but there is none. {LOGIN_ADVICE}."
        )
    try:
        account = HfApi(token=token).whoami()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ValueError(f"The Hub does not accept the access token. {LOGIN_ADVICE} to a valid token.") from error
        raise
    except OfflineModeIsEnabled as error:
        raise ValueError(f"Publishing `{repo_id}` needs the Hub, but `HF_HUB_OFFLINE` is set.") from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"Publishing `{repo_id}` on the Hub needs an access token with the right to write, but this one may only "
            f"read. Create one in the settings of the Hub. {LOGIN_ADVICE} to it."
        )
    owner, _, name = repo_id.rpartition("/")
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if owner and owner.lower() not in [known.lower() for known in owners]:
        raise ValueError(
            f"`repo_id`={repo_id!r} belongs to {owner!r}, but the access token can write for {', '.join(owners)} only. "
            "Use one of these owners, or a token of the other account."
        )
    return f"{owner or account['name']}/{name}"


def publish(
    pipeline_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    base_model: str | list[str] | None = None,
    tags: list[str] | None = None,
    pipeline_tag: str | None = None,
    facts: dict | None = None,
) -> PublishedPipeline:
    r"""
    Puts a saved pipeline on the Hub, with a model card.

    Two revisions are written. `main` is for users of this package. The branch `remote-code` also holds the Python files
    of the pipeline's classes, and is for users of diffusers alone. The card of `main` pins the commit of that branch.

    Uploaded are `model_index.json`, the configuration, safetensors weights and tokenizer files of the pipeline's
    components, the card and the sample grid, and nothing else. Local paths are taken out of the configuration. Files
    that an earlier publication left in the components' folders are deleted; other files of the repository stay.

    Args:
        pipeline_dir (`str` or `Path`):
            Folder written by `save_pretrained`. `training_summary.json` in it tells the card how the model was
            trained. A `README.md` in it is used as it is, in place of a card.
        repo_id (`str`): `"owner/name"`, or `"name"` for a repository of the user. Created if it does not exist.
        private (`bool`, defaults to `False`):
            Create a private repository. The visibility of an existing repository is never changed: asking for a
            private one where a public one exists is an error.
        token (`str`, *optional*): access token; `None` is the one that `hf auth login` or `HF_TOKEN` gave.
        commit_message (`str`, *optional*, defaults to `"Publish <class of the pipeline>"`): message of both commits.
        license (`str`, *optional*): licence of the weights, as the Hub names it (`"apache-2.0"`).
        datasets (`str` or `list[str]`, *optional*): ids on the Hub of the training data.
        base_model (`str` or `list[str]`, *optional*): id on the Hub of the model that this one was trained from.
        tags (`list[str]`, *optional*): further tags of the card.
        pipeline_tag (`str`, *optional*): task as the Hub names it; see [`create_model_card`].
        facts (`dict`, *optional*): facts for the card, in addition to the training summary; see [`create_model_card`].

    Returns:
        [`PublishedPipeline`]: the repository, its address and the two commits.

    Raises:
        `ValueError`: on everything that would fail later, before anything is created or uploaded.

    Examples:
        ```py
        >>> from diffusers_dyna.hub import publish

        >>> published = publish("outputs/digits", "my-name/dyna-unet-digits", license="apache-2.0")
        >>> print(published.url)
        ```
    """
    folder = read_pipeline_folder(pipeline_dir)
    card_settings = {
        "facts": facts,
        "license": license,
        "datasets": datasets,
        "base_model": base_model,
        "tags": tags,
        "pipeline_tag": pipeline_tag,
    }
    _check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as staging:
        main, remote_code = Path(staging, "main"), Path(staging, "remote-code")
        for target in (main, remote_code):
            _stage_files(folder, target, facts)
            _write_card(folder, target, repo_id, card_settings)
        _add_code(folder, remote_code)

        repo_id = check_can_publish(repo_id, token)
        api = HfApi(token=token)
        _check_visibility(api, repo_id, private)
        # `None` and not `False` for a public repository: an organization may have decided that its own are private.
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.create_branch(repo_id, branch=REMOTE_CODE_BRANCH, exist_ok=True)

        # The code goes first: the card of `main` pins the commit that this makes.
        commit_message = commit_message or f"Publish {folder.pipeline_class.__name__}"
        stale = [f"{name}/{pattern}" for name in folder.components for pattern in WEIGHT_PATTERNS + CONFIG_PATTERNS]
        stale += [f"{name}/{pattern}" for name in folder.components for pattern in TOKENIZER_PATTERNS]
        _write_card(folder, remote_code, repo_id, card_settings)
        code_commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=remote_code,
            revision=REMOTE_CODE_BRANCH,
            commit_message=commit_message,
            delete_patterns=stale + [f"{name}/*.py" for name in folder.components],
        )
        _write_card(folder, main, repo_id, {**card_settings, "remote_code_revision": code_commit.oid})
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=main, commit_message=commit_message, delete_patterns=stale
        )
    return PublishedPipeline(repo_id, str(url), commit.oid, code_commit.oid)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`repo_id`={str(repo_id)!r} is no name of a repository: {error} Use 'owner/name' or 'name'."
        ) from error
    if not repo_id:
        raise ValueError("`repo_id` is empty. Use 'owner/name' or 'name'.")


def _check_visibility(api: HfApi, repo_id: str, private: bool) -> None:
    if not private:
        return
    try:
        exists_in_public = not api.model_info(repo_id).private
    except RepositoryNotFoundError:
        return
    if exists_in_public:
        raise ValueError(
            f"`private=True` was asked for, but the repository `{repo_id}` exists and is public. Make it private in "
            "its settings first, or choose another name."
        )


def _stage_files(folder: PipelineFolder, target: Path, facts: dict | None) -> None:
    """Fills a clean folder with what may be published: the allow-list, without local paths."""
    target.mkdir()
    index = {key: value for key, value in folder.index.items() if key not in PATH_KEYS}
    for name, cls in folder.own_classes.items():
        index[name] = ["diffusers_dyna", cls.__name__]
    _write_json(target / "model_index.json", index)

    for name in folder.components:
        (target / name).mkdir()
        for file in sorted((folder.path / name).iterdir()):
            staged = target / name / file.name
            if _matches(file.name, CONFIG_PATTERNS):
                config = json.loads(file.read_text(encoding="utf-8"))
                _write_json(staged, {key: value for key, value in config.items() if key not in PATH_KEYS})
            elif _matches(file.name, WEIGHT_PATTERNS + TOKENIZER_PATTERNS):
                _link(file, staged)

    grid = gather_facts(folder, facts).get("sample_grid", {})
    if grid.get("file"):
        picture = (folder.path / grid["file"]).resolve()
        if not picture.is_relative_to(folder.path) or not picture.is_file() or picture.suffix.lower() != ".png":
            raise ValueError(
                f"`sample_grid` names the file {grid['file']!r}, which is no PNG picture in `pipeline_dir`. Put it "
                "there, or leave `sample_grid` out."
            )
        _link(picture, target / picture.name)
    for name in ACTIVITY_PICTURES:
        if (folder.path / name).is_file():
            _link(folder.path / name, target / name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _write_json(file: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source.resolve(), target)  # weights may be larger than the disk of the temporary folder
    except OSError:
        shutil.copyfile(source, target)


def _write_card(folder: PipelineFolder, target: Path, repo_id: str, settings: dict) -> None:
    own_card = folder.path / "README.md"
    if own_card.is_file():
        try:
            ModelCard.load(own_card)
        except Exception as error:  # of the YAML parser, or of the classes that hold the metadata
            raise ValueError(f"The metadata of `README.md` in `pipeline_dir` cannot be read: {error}") from error
        shutil.copyfile(own_card, target / "README.md")
        return
    card = str(create_model_card(folder.path, repo_id, **settings))
    for path in {str(folder.path), str(Path.home())} - {"/"}:
        if re.search(re.escape(path) + r"(?![\w-])", card):
            raise ValueError(f"The model card would hold the local path {path!r}. Take it out of `facts`.")
    (target / "README.md").write_text(card, encoding="utf-8")


def _add_code(folder: PipelineFolder, target: Path) -> None:
    """Turns a staged pipeline into one that carries its own code."""
    index = json.loads((target / "model_index.json").read_text(encoding="utf-8"))
    for name, cls in folder.own_classes.items():
        file = Path(inspect.getsourcefile(cls))
        source = file.read_text(encoding="utf-8")
        if re.search(r"^\s*from\s+\.", source, flags=re.MULTILINE):
            raise ValueError(f"`{file.name}` has relative imports, so that it cannot be published alone.")
        _check_imports_nothing_of_ours(file.name, source)
        (target / name / file.name).write_text(source, encoding="utf-8")
        index[name] = [file.stem, cls.__name__]

    file = Path(inspect.getsourcefile(folder.pipeline_class))
    source = without_package_imports(with_relative_imports_inlined(file), file.name)
    (target / "pipeline.py").write_text(source, encoding="utf-8")
    index["_class_name"] = ["pipeline", folder.pipeline_class.__name__]
    _write_json(target / "model_index.json", index)


def with_relative_imports_inlined(file: Path) -> str:
    """
    Makes one file of a pipeline and the modules beside it that it imports from.

    Args:
        file (`Path`): Python file with `from .<module> import <names>` at the top level.

    Returns:
        `str`: the source, in which the content of each such module stands in the place of the import, without its
        licence line and docstring. Imports that both have stand there twice.

    Raises:
        `ValueError`: on an import of another kind from beside the file, and on one under another name.
    """
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            if node.level > 1 or not node.module or any(alias.asname or alias.name == "*" for alias in node.names):
                raise ValueError(
                    f"`{file.name}` has the import {ast.unparse(node)!r}. A file that is published alone can take in a "
                    "file beside it only, as `from .<module> import <names>`."
                )
            module = with_relative_imports_inlined(file.with_name(f"{node.module}.py"))
            body = ast.parse(module).body
            first = body[1] if ast.get_docstring(ast.parse(module)) else body[0]
            content = module.splitlines(keepends=True)[first.lineno - 1 :]
            lines[node.lineno - 1 : node.end_lineno] = [*content, "\n", "\n"]
    return "".join(lines)


def without_package_imports(source: str, file_name: str) -> str:
    """
    Rewrites the source of a pipeline so that it works without this package.

    The classes of the components are imported for type hints only, since diffusers loads each of them from the file in
    its component's folder. An import of that file would not do as a type hint: diffusers executes the file once more
    when it loads the component, and would warn that the class is not the expected one. The name therefore becomes that
    of the base class.

    Args:
        source (`str`): Python source of a pipeline.
        file_name (`str`): its name, for messages.

    Returns:
        `str`: the source, in which nothing of `diffusers_dyna` is imported.

    Raises:
        `ValueError`: where a name of the package is used outside type hints, or imported in another way than by `from
            diffusers_dyna.<module> import <model or scheduler>` at the top level.
    """
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    names = []
    for node in reversed(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffusers_dyna":
            module = importlib.import_module(node.module)
            replacement = []
            for alias in node.names:
                cls, name = getattr(module, alias.name), alias.asname or alias.name
                base = next((base for base in (ModelMixin, SchedulerMixin) if issubclass(cls, base)), None)
                if base is None:
                    raise ValueError(f"`{file_name}` imports {alias.name}, which is neither a model nor a scheduler.")
                comment = f"the class is in the component's folder: {node.module.split('.')[-1]}.py"
                replacement.append(f"from diffusers import {base.__name__} as {name}  # {comment}\n")
                names.append(name)
            lines[node.lineno - 1 : node.end_lineno] = replacement

    in_hints = set()
    for node in ast.walk(tree):
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(hint, ast.AST):
                in_hints.update(id(part) for part in ast.walk(hint))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and id(node) not in in_hints:
            raise ValueError(
                f"`{file_name}` uses {node.id} in line {node.lineno}. In a file that is published alone, the classes "
                "of diffusers_dyna can be used in type hints only."
            )
    source = "".join(lines)
    _check_imports_nothing_of_ours(file_name, source)
    return source


def _check_imports_nothing_of_ours(file_name: str, source: str) -> None:
    # Docstrings count too: diffusers looks for imports by text, and would tell the user to install the package.
    if line := re.search(r"^\s*(from|import)\s+diffusers_dyna\b.*$", source, flags=re.MULTILINE):
        raise ValueError(f"`{file_name}` still imports diffusers_dyna when published alone: {line[0].strip()!r}.")
