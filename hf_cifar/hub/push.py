"""Push a finished run to the Hub in one commit, after checking everything."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, ModelCard, SpaceCard, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from hf_cifar.errors import UserError
from hf_cifar.hub.reach import require_network
from hf_cifar.text import megabytes, one_line

if TYPE_CHECKING:
    from hf_cifar.config.training import TrainingConfig

CARD_FILE = "README.md"
EVAL_RESULTS_FOLDER = ".eval_results"
# The files needed to use and judge the model; no checkpoints, pickles, or configs with local paths.
PUSHED_FILES = (
    CARD_FILE,
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "preprocessor_config.json",
    "adapter/adapter_*",
    "*.py",
    "requirements.txt",
    "metrics.json",
    f"{EVAL_RESULTS_FOLDER}/*.yaml",
    "report.html",
    "report.json",
)
COMMIT_MESSAGES = {"model": "Fine-tuned with hf_cifar", "space": "Demo made with hf_cifar"}
# Seconds to wait before each retry of a failed commit; the client itself retries everything else. Uploaded
# files are not sent again.
WAITS_S = (1.0, 3.0)
NEXT_STEPS = {
    401: "the token is invalid or expired: run hf auth login",
    402: "this requires a paid account: see its settings on the Hub",
    403: "the token has no write access: choose another repository or token",
    409: "the repository is being changed by another client: try again",
    413: "a file is too large for the Hub",
    429: "the Hub limits the rate of requests: try again in a few minutes",
}


@dataclass(frozen=True)
class Target:
    """The destination of a push. repo_id: with or without a namespace. token: the stored one if None. kind:
    of the repository; a Space runs Gradio."""

    repo_id: str
    private: bool = True
    revision: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    kind: Literal["model", "space"] = "model"

    @classmethod
    def of_run(cls, train: TrainingConfig) -> Target:
        """What the options of a run with --push_to_hub say."""
        return cls(
            repo_id=train.hub_model_id or Path(train.output_dir).resolve().name,
            private=train.hub_private_repo,
            revision=train.hub_revision,
            token=train.hub_token,
        )

    @property
    def api(self) -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(token=self.token)

    def create(self, repo_id: str) -> str:
        """Create the repository unless it exists, and return its URL."""
        sdk = "gradio" if self.kind == "space" else None
        url = self.api.create_repo(
            repo_id, private=self.private, exist_ok=True, repo_type=self.kind, space_sdk=sdk
        )
        return str(url)


class Access(NamedTuple):
    """The Hub's answer about a target. repo_id: with its namespace. visibility: private or public."""

    repo_id: str
    user: str
    is_new: bool
    visibility: str


class PushPlan(NamedTuple):
    """A push that has passed all checks. folder: of the run. files: by path in the repository."""

    folder: Path
    target: Target
    access: Access
    files: dict[str, Path | bytes]


def check_online(what: str, token: str | None) -> None:
    """Raises: UserError if there is no network or no token for `what`."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what} needs the network, but HF_HUB_OFFLINE=1 forbids it; unset it")
    require_network(what, "check the connection and HF_ENDPOINT")
    if not (token or huggingface_hub.get_token()):
        raise UserError(f"{what} needs a token; run: hf auth login, or set HF_TOKEN")


def check_access(target: Target) -> Access:
    """Ask the Hub who owns the token and whether they may write to the repository.

    Raises: UserError for an invalid name, an invalid token, or no permission.
    """
    try:
        who = target.api.whoami()
        repo_id = target.repo_id if "/" in target.repo_id else f"{who['name']}/{target.repo_id}"
        validate_repo_id(repo_id)
        try:
            info = target.api.repo_info(repo_id, repo_type=target.kind)
        except RepositoryNotFoundError:
            _check_namespace(repo_id, who)
            return Access(repo_id, who["name"], True, "private" if target.private else "public")
        target.api.auth_check(repo_id, repo_type=target.kind, write=True)
        return Access(repo_id, who["name"], False, "private" if info.private else "public")
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(
            f"{target.repo_id!r} is not a valid repository name ({one_line(error, 200)}); pass another"
        ) from None
    except Exception as error:  # the client raises its own, httpx's and OS errors
        raise UserError(
            f"cannot push to {target.repo_id}: {reason_of(error, target.token)}"
        ) from None


def _check_namespace(repo_id: str, who: dict[str, Any]) -> None:
    """Raises: UserError if, by the account's data, the token cannot create a repository in its namespace."""
    namespace = repo_id.split("/")[0]
    token = who.get("auth", {}).get("accessToken", {})
    roles = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])}
    if token.get("role") == "read":
        raise UserError(
            f"cannot push to {repo_id}: the token of {who['name']} is read-only; create one with write "
            "access at https://huggingface.co/settings/tokens"
        )
    if namespace not in {who["name"], *roles} or roles.get(namespace) == "read":
        raise UserError(
            f"cannot push to {repo_id}: {who['name']} has no write access to {namespace}; choose a name in "
            f"{' or '.join([who['name'], *(org for org, role in roles.items() if role != 'read')])}"
        )


def check_card(text: str, kind: str = "model") -> None:
    """Raises: UserError for metadata that the Hub would reject, as far as the client can check."""
    try:
        # A ModelCardData or SpaceCardData, declared as their parent.
        data: Any = (SpaceCard if kind == "space" else ModelCard)(text).data
        bases = data.models or [] if kind == "space" else [data.base_model]
        for repo_id in (*bases, *(data.datasets or [])):
            if repo_id is not None:
                validate_repo_id(repo_id)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"the {kind} card's metadata is not valid ({one_line(error, 300)}); fix the top of "
            f"{CARD_FILE}"
        ) from None


def check_card_on_hub(text: str, target: Target) -> None:
    """Let the Hub check a card's metadata, as it does before accepting a commit.

    Raises: UserError if it rejects them.
    """
    check_card(text, target.kind)
    try:
        _validate_card(text, target.kind)
    except ValueError as error:
        raise UserError(
            f"the Hub rejects the {target.kind} card's metadata ({one_line(error, 200)}); fix the top of "
            f"{CARD_FILE}"
        ) from None
    except Exception as error:  # as above
        raise UserError(
            f"cannot push to {target.repo_id}: {reason_of(error, target.token)}"
        ) from None


def _validate_card(text: str, kind: str) -> None:
    """Check like `ModelCard.validate`, which ignores HF_ENDPOINT before huggingface_hub 2.

    Raises: ValueError for invalid metadata.
    """
    response = get_session().post(
        f"{constants.ENDPOINT}/api/validate-yaml",
        json={"repoType": kind, "content": text},
        headers={"Accept": "text/plain"},
    )
    if response.status_code == 400:
        raise ValueError(response.text)
    hf_raise_for_status(response)


def files_to_push(folder: Path) -> dict[str, Path]:
    """Map paths in the repository to a run's files. Raises: UserError if there is no model."""
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in PUSHED_FILES
        for path in sorted(folder.glob(pattern))
    }
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"no finished model in {folder}; pass the --output_dir of a run")
    return files


def plan_push(
    folder: Path,
    target: Target,
    card_for: Callable[[Path, str], str],
    added: Mapping[str, bytes] | None = None,
) -> PushPlan:
    """Check everything about a push that can be checked in advance.

    card_for: returns the card of a run for the name of a repository. added: files that the folder lacks.
    Raises: UserError for anything that would make it fail, or would upload private data.
    """
    files: dict[str, Path | bytes] = {**files_to_push(folder), **(added or {})}
    return plan_files(folder, target, files, lambda repo_id: card_for(folder, repo_id))


def plan_files(
    folder: Path,
    target: Target,
    given: Mapping[str, Path | bytes],
    card_for: Callable[[str], str],
) -> PushPlan:
    """Check everything about a push of files in a folder, by path in the repository; see `plan_push`.

    card_for: returns the card for the name of the repository.
    """
    files: dict[str, Path | bytes] = dict(given)
    check_online("a push", target.token)
    access = check_access(target)
    card = card_for(access.repo_id)
    files[CARD_FILE] = card.encode()
    token = target.token or huggingface_hub.get_token()
    assert token is not None  # see `check_online`
    _refuse_secrets(files, folder, token)
    check_card_on_hub(card, target)
    return PushPlan(folder, target, access, files)


def _refuse_secrets(files: dict[str, Path | bytes], folder: Path, token: str) -> None:
    """Raises: UserError if a text file contains the token or the path of the run's folder."""
    for name, file in files.items():
        if name.endswith(".safetensors"):
            continue
        content = file if isinstance(file, bytes) else file.read_bytes()
        for what, secret in (("the token", token), ("a local path", str(folder.resolve()))):
            if secret.encode() in content:
                raise UserError(f"{folder / name} contains {what}; remove it before pushing")


def render_plan(plan: PushPlan) -> str:
    """Describe the effect of a push."""
    access, revision = plan.access, plan.target.revision
    sizes = {
        name: len(file) if isinstance(file, bytes) else file.stat().st_size
        for name, file in plan.files.items()
    }
    lines = [
        f"repository  {access.repo_id}, {'new' if access.is_new else 'existing'}, {access.visibility}"
        + (f", branch {revision}" if revision else ""),
        f"token       of {access.user}, not shown",
        "permission  to create it" if access.is_new else "permission  to write",
        "card        valid",
        f"files       {len(sizes)}, {megabytes(sum(sizes.values()))}, in one commit",
    ]
    return "\n".join(
        [*lines, *(f"  {megabytes(size):>12}  {name}" for name, size in sizes.items())]
    )


def push_planned(plan: PushPlan) -> str:
    """Upload in one commit, skipping files that the Hub already has. Returns the repository's URL.

    Raises: UserError that says how to retry.
    """
    target, repo_id = plan.target, plan.access.repo_id
    api = target.api
    try:
        url = target.create(repo_id)
        if target.revision and not target.revision.startswith("refs/"):
            api.create_branch(repo_id, branch=target.revision, repo_type=target.kind, exist_ok=True)
        for wait_s in WAITS_S:
            try:
                _commit(plan)
                break
            except Exception as error:
                if not _is_transient(error):
                    raise
                time.sleep(wait_s)
        else:
            _commit(plan)
    except Exception as error:  # as above
        raise UserError(
            f"push to {repo_id} failed: {reason_of(error, target.token)}{_retry(plan.folder, target)}"
        ) from None
    return url


def _commit(plan: PushPlan) -> None:
    """Commit the files that the Hub lacks. Operations store upload state, so each attempt makes new ones."""
    plan.target.api.create_commit(
        plan.access.repo_id,
        [CommitOperationAdd(name, file) for name, file in plan.files.items()],
        commit_message=COMMIT_MESSAGES[plan.target.kind],
        repo_type=plan.target.kind,
        revision=plan.target.revision,
    )


def check_push(train: TrainingConfig) -> None:
    """Raises: UserError if --push_to_hub has no network or no token."""
    if train.push_to_hub:
        check_online("--push_to_hub", train.hub_token)


def prepare_push(train: TrainingConfig, card: str) -> None:
    """Fail before training if the push could not work: ask for permission, have the card as it is by then
    checked, and make the repository.

    Raises: UserError for a refusal by the Hub.
    """
    if not train.push_to_hub:
        return
    target = Target.of_run(train)
    access = check_access(target)
    check_card_on_hub(card, target)
    try:
        target.create(access.repo_id)
    except Exception as error:  # as above
        raise UserError(
            f"--push_to_hub: cannot create {access.repo_id}: {reason_of(error, target.token)}"
        ) from None


def push_run(train: TrainingConfig, card_for: Callable[[Path, str], str]) -> str:
    """Push a finished run; returns the repository's URL. card_for: see `plan_push`.

    Raises: UserError that says how to retry; the model stays saved in the run's folder.
    """
    folder, target = Path(train.output_dir), Target.of_run(train)
    try:
        plan = plan_push(folder, target, card_for)
    except UserError as error:
        raise UserError(f"{error}{_retry(folder, target)}") from None
    return push_planned(plan)


def _retry(folder: Path, target: Target) -> str:
    """End an error message with the command that retries the push, without the token."""
    if target.kind == "space":
        upload = ["hf", "upload", target.repo_id, str(folder), "--repo-type", "space"]
        upload += ["--private"] if target.private else []
        return f"; the Space is written in {folder}; retry with: {shlex.join(upload)}"
    parts = ["hf-cifar", "push", str(folder), "--repo_id", target.repo_id]
    parts += ["--revision", target.revision] if target.revision else []
    parts += [] if target.private else ["--private", "false"]
    token = "set HF_TOKEN and " if target.token else ""
    return f"; the model is saved in {folder}; {token}retry with: {shlex.join(parts)}"


def _is_transient(error: Exception) -> bool:
    """True if a retry may help: the Hub was busy or failed, or the connection broke; not after a refusal."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, ValueError)


def reason_of(error: Exception, token: str | None = None) -> str:
    """Format an error of the client as one line, with what to do next and without the token."""
    text = f"{type(error).__name__}: {one_line(error, 200)}"
    for secret in (token, huggingface_hub.get_token()):
        text = text.replace(secret, "...") if secret else text
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        step = "the Hub failed: try again" if status >= 500 else NEXT_STEPS.get(status)
        return f"{step} ({text})" if step else text
    return text
