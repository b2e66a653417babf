"""Tests the patterns of secrets that `mainrun submit` finds, with an example and near misses of each.

The examples are assembled at run time, so that this file contains no secrets.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

import pytest

from reports.submission import leaks

MIXED = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0z"  # 31 letters and digits


def chars(n: int) -> str:
    """Return `n` letters and digits that don't look like a placeholder."""
    return "".join(itertools.islice(itertools.cycle(MIXED), n))


def capitals(n: int) -> str:
    return "".join(itertools.islice(itertools.cycle("A1B2C3D4E5F6G7H8" + string.ascii_uppercase + "90"), n))


def words(text: str) -> list[str]:
    return text.split()


def web_token(a: int, b: int, c: int, first: str = ".", second: str = ".") -> str:
    return "ey" + f"J{chars(a)}{first}ey" + f"J{chars(b)}{second}{chars(c)}"


def kinds(text: str) -> list[str]:
    return [kind for _, kind in leaks.secrets_in(text.encode())]


# -- names of files

FILE_NAMES = words(
    ".env .envrc .env.local .env.production .ENV prod.env a.b.env "
    "id_rsa id_dsa id_ecdsa id_ed25519 id_rsa_sk id_dsa_sk id_ecdsa_sk id_ed25519_sk ID_RSA "
    "x.pem server.pem x.key x.p12 x.pfx x.p8 x.jks x.keystore x.kdbx x.ppk x.asc x.gpg "
    "x.tfstate x.tfvars X.PEM "
    ".netrc _netrc .npmrc .pypirc .git-credentials .pgpass .htpasswd .vault-token .dockercfg .boto .s3cfg "
    "credential credentials credential.json credentials.json credentials.yaml credentials.yml "
    "credentials.toml "
    "credentials.ini credentials.txt credentials.csv "
    "secret.json secrets.json secrets.yaml secrets.yml secrets.toml secrets.ini secrets.txt "
    "apikey api_key api-key apikeys api_keys api_key.txt api_keys.txt "
    "token tokens token.txt tokens.txt hftoken hf_token hf-token hf_tokens.txt "
    "password passwords password.txt "
    "serviceaccount.json service_account.json service-account.json service-account-3.json "
    "client_secret.json client-secret.json client_secret_7.json rclone.conf kubeconfig"
)
HARMLESS_FILE_NAMES = words(
    "env .environment env.local .envrc2 .envr prod.env.py a.envx xenv prodxenv "
    "id_rsa.pub id_rs id_ed448 xid_rsa id_rsa_s id_rsa_skx "
    "pem x.pem.py x.keys monkey x.p7 x.p123 x.pfxx x.jk x.keystores x.kdb x.pp x.as x.gpgx "
    "x.tfstat x.tfvar xpem .pem "
    "netrc -netrc xnpmrc .npmrc2 .pypirc.py .git-credential git-credentials .pgpas .htpasswds .vault_token "
    ".dockercf .boto3 s3cfg .s3cf "
    "xpypirc xgit-credentials xpgpass xhtpasswd xvault-token xdockercfg xboto xs3cfg "
    "credentials.py credentialss mycredentials credentialsxjson credentials.jsonl credentials.md "
    "secret secrets secrets.py secretsxjson mysecrets.json secrets.csv "
    "apikey.py api.key.py api__key apikeyss token.py tokens.json mytoken hf__token xhf_token tokenxtxt "
    "passwordss passwords.md service__account.json service_account.py service_accountxjson "
    "my-service-account.json service-accoun.json clientsecret.json client_secret.txt client_secretxjson "
    "client_secre.json my_client_secret.json rclonexconf rclone.config kubeconfig.yaml my_kubeconfig "
    ".env.example .env.sample .env.template .env.dist .ENV.Example"
)


@pytest.mark.parametrize("name", FILE_NAMES)
@pytest.mark.parametrize("folder", ["", "a/b/"])
def test_a_file_name_for_keys(folder: str, name: str) -> None:
    assert leaks.secret_name(folder + name) == "files with this name usually contain keys or passwords"


@pytest.mark.parametrize("name", HARMLESS_FILE_NAMES)
def test_a_harmless_file_name(name: str) -> None:
    assert leaks.secret_name(name) == "" and leaks.secret_name(f"a/b/{name}") == ""


@pytest.mark.parametrize(
    "name",
    [".env.examples", ".env.example.local", ".env.samples", ".env.x.dist", ".env.exampl", ".env.xexample"],
)
def test_only_templates_are_exempt(name: str) -> None:
    assert leaks.secret_name(name) != ""


@pytest.mark.parametrize("folder", [".aws", ".ssh", ".gnupg", ".kube", ".docker", ".azure", ".gcloud"])
def test_a_folder_of_keys(folder: str) -> None:
    for path in (f"{folder}/x.py", f"a/{folder}/b/c.py"):
        assert leaks.secret_name(path) == f"{folder}/ is a folder for keys"
    assert leaks.secret_name(f"{folder.upper()}/x.py") == f"{folder.upper()}/ is a folder for keys"
    for path in (folder, f"a/{folder}", f"{folder[1:]}/x.py", f"{folder}2/x.py"):
        assert leaks.secret_name(path) == ""


# -- files that are left out

FOLDERS = {
    ".git": "a file of git", ".venv": "a virtual environment", "venv": "a virtual environment",
    "node_modules": "installed packages", "site-packages": "installed packages",
    "__pycache__": "a cache", ".cache": "a cache", ".mypy_cache": "a cache",
    ".ruff_cache": "a cache", ".pytest_cache": "a cache", ".hypothesis": "a cache", ".task": "a cache",
    ".ipynb_checkpoints": "a cache", "wandb": "runs", "mainrun.egg-info": "packaging",
}  # fmt: skip
TOP_FOLDERS = {"runs": "runs", "data": "data", "build": "a build", "dist": "a build"}
ENDINGS = {
    "data": "parquet csv tsv jsonl arrow feather npy npz h5 hdf5 db sqlite sqlite3",
    "weights": "pt pth ckpt safetensors bin gguf onnx pkl pickle",
    "an archive": "zip gz tgz tar bz2 xz 7z zst rar whl jar",
    "a cache": "pyc pyo",
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_is_left_out(folder: str) -> None:
    for path in (f"{folder}/x.py", f"a/{folder}/b/x.py"):
        assert leaks.left_out(path) == FOLDERS[folder]
    for path in (
        folder,
        f"a/{folder}",
        f"{folder}2/x.py",
        f"a/x{folder}2/x.py",
        folder.replace(".", "x") + "2/x.py",
    ):
        assert leaks.left_out(path) == ""
    assert leaks.left_out("egg-info/x.py") == ""


@pytest.mark.parametrize("folder", TOP_FOLDERS)
def test_a_folder_that_is_left_out_only_at_the_top(folder: str) -> None:
    for path in (f"{folder}/x.py", f"{folder}/a/x.py"):
        assert leaks.left_out(path) == TOP_FOLDERS[folder]
    for path in (folder, f"mainrun/{folder}/x.py", f"{folder}2/x.py"):
        assert leaks.left_out(path) == ""


@pytest.mark.parametrize(
    ("ending", "kind"), [(ending, kind) for kind, endings in ENDINGS.items() for ending in endings.split()]
)
def test_an_ending_that_is_left_out(ending: str, kind: str) -> None:
    for path in (f"x.{ending}", f"a/b.c.{ending}", f"x.{ending.upper()}"):
        assert leaks.left_out(path) == kind
    for path in (ending, f"x{ending}", f"x.{ending}.py", f"x.{ending}_", f"a.{ending}/x.py"):
        assert leaks.left_out(path) == ""


MAGIC = {
    "zip": b"PK\x03\x04", "gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00",
    "7z": b"7z\xbc\xaf\x27\x1c", "zstd": b"\x28\xb5\x2f\xfd", "rar": b"Rar!",
    "sqlite": b"SQLite format 3\x00",
    "tar": b"x" * 257 + b"ustar",
}  # fmt: skip


@pytest.mark.parametrize("kind", MAGIC)
def test_an_archive_is_recognised_by_its_first_bytes(kind: str) -> None:
    magic = MAGIC[kind]
    assert leaks.is_archive(magic) and leaks.is_archive(magic + b"more")
    for near_miss in (b"y" + magic, magic[:-1], magic[:-1] + b"?", magic[1:]):
        assert not leaks.is_archive(near_miss)


def test_plain_text_is_not_an_archive() -> None:
    assert not leaks.is_archive(b"") and not leaks.is_archive(b"import os\n" * 100)


# -- keys in texts

HEADERS = (("Authorization", 15), ("xauthorization", 16), ("authorizations", 16))
# Each case has the kind of a key, an example, and near misses.
CASES: list[tuple[str, str, list[str]]] = [
    (
        "a private key",
        "-----BEGIN " + "PRIVATE KEY-----",
        ["----BEGIN " + "PRIVATE KEY-----", "-----BEGIN " + "PRIVATE KEY----"],
    ),
    (
        "a private key",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        ["-----BEGIN RSA PUBLIC KEY-----", "-----BEGIN rsa " + "PRIVATE KEY-----"],
    ),
    (
        "a private key",
        "-----BEGIN A1 B2 C3 " + "PRIVATE KEY-----",
        ["-----BEGIN A1B2C3" + "PRIVATE KEY-----"],
    ),
    (
        "a private key",
        "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----",
        ["-----BEGIN PGP " + "PRIVATE KEYBLOCK-----"],
    ),
    ("a private key", "-----BEGIN X25519 " + "PRIVATE KEY-----", ["-----BEGIN CERTIFICATE-----"]),
    (
        "a private key",
        "PuTTY-User-" + "Key-File-3",
        ["PuTTY-User-" + "Key-File-x", "PuTTY-User-" + "Key-File"],
    ),
    *(
        (
            "an AWS key",
            prefix + capitals(16),
            [prefix + capitals(15), prefix + capitals(17), "x" + prefix + capitals(16)],
        )
        for prefix in ("AK" + "IA", "AS" + "IA", "AB" + "IA", "AC" + "CA")
    ),
    ("an AWS key", "AK" + "IA" + capitals(16), ["AI" + "DA" + capitals(16), "AK" + "IA" + chars(16)]),
    *(
        (
            "a GitHub token",
            f"gh{letter}" + "_" + chars(30),
            [f"gh{letter}" + "_" + chars(29), f"xgh{letter}" + "_" + chars(30)],
        )
        for letter in "pousr"
    ),
    ("a GitHub token", "gh" + "p_" + chars(60), ["gh" + "x_" + chars(36), "gh" + "p-" + chars(36)]),
    (
        "a GitHub token",
        "github" + "_pat_" + chars(29) + "_",
        ["github" + "_pat_" + chars(29), "xgithub" + "_pat_" + chars(40)],
    ),
    (
        "a GitLab token",
        "gl" + "pat-" + chars(17) + "-_9",
        ["gl" + "pat-" + chars(19), "xgl" + "pat-" + chars(20)],
    ),
    ("a GitLab token", "gl" + "pat-" + chars(40), ["gl" + "pat_" + chars(20)]),
    (
        "a Hugging Face token",
        "h" + "f_" + chars(30),
        ["h" + "f_" + chars(29), "xh" + "f_" + chars(34), "h" + "f-" + chars(34)],
    ),
    (
        "a Hugging Face token",
        "api" + "_org_" + chars(30),
        ["api" + "_org_" + chars(29), "xapi" + "_org_" + chars(34)],
    ),
    (
        "an API key",
        "s" + "k-" + chars(20),
        ["s" + "k-" + chars(19), "xs" + "k-" + chars(30), "s" + "k_" + chars(30)],
    ),
    ("an API key", "s" + "k-ant-api03-" + chars(10), ["s" + "k-ant-api03-" + chars(9)]),
    ("an API key", "s" + "k-" + chars(18) + "_-", ["s" + "k-" + chars(18) + "+/"]),
    (
        "an API key",
        "s" + "k_live_" + chars(20),
        ["s" + "k_live_" + chars(19), "xs" + "k_live_" + chars(24), "s" + "k_test_" + chars(24)],
    ),
    ("an API key", "r" + "k_live_" + chars(20), ["r" + "k_live_" + chars(19), "p" + "k_live_" + chars(24)]),
    (
        "a Google key",
        "AI" + "za" + chars(33) + "-_",
        ["AI" + "za" + chars(34), "xAI" + "za" + chars(35), "ai" + "za" + chars(35)],
    ),
    (
        "a Google key",
        "GO" + "CSPX-" + chars(18) + "-_",
        ["GO" + "CSPX-" + chars(19), "xGO" + "CSPX-" + chars(20)],
    ),
    (
        "a Google key",
        "ya" + "29." + chars(18) + "-_",
        ["ya" + "29." + chars(19), "ya" + "29x" + chars(20), "xya" + "29." + chars(20)],
    ),
    *(
        (
            "a Slack token",
            f"xox{letter}" + "-" + chars(9) + "-",
            [f"xox{letter}" + "-" + chars(9), f"axox{letter}" + "-" + chars(10)],
        )
        for letter in "abeoprs"
    ),
    ("a Slack token", "xox" + "b-" + chars(30), ["xox" + "z-" + chars(30), "xox" + "b_" + chars(30)]),
    (
        "a Slack token",
        "https://hooks.slack" + ".com/services/T1/B2/c3",
        [
            f"https://hooks{rest}"
            for rest in (
                ".slack.com/services/T1/B2/",
                ".slack.com/services/T1/X2/c3",
                ".slack.com/services/X1/B2/c3",
            )
        ],
    ),
    ("a Slack token", "hooks.slack" + ".com/services/T12/B34/c56", ["hooksxslack.com/services/T1/B2/c3"]),
    ("a Slack token", "hooks.slack" + ".com/services/TT/BB/cc", ["hooks.slackxcom/services/T1/B2/c3"]),
    ("an npm token", "np" + "m_" + chars(36), ["np" + "m_" + chars(35), "xnp" + "m_" + chars(36)]),
    (
        "an npm token",
        "//r.org/:_auth" + "Token=abcdefgh",
        ["//r.org/:_auth" + "Token=abcdefg", "//r.org/:_auth" + "Token=$" + "abcdefgh"],
    ),
    (
        "an npm token",
        "_auth" + "Token  =  abcdefgh",
        ["_auth" + "Token:abcdefgh", "_auth" + "Token=abc defgh", "auth" + "Token=abcdefgh"],
    ),
    ("a PyPI token", "py" + "pi-" + chars(48) + "-_", ["py" + "pi-" + chars(49), "xpy" + "pi-" + chars(60)]),
    (
        "a JSON web token",
        web_token(10, 10, 5),
        [
            web_token(9, 10, 5),
            web_token(10, 9, 5),
            web_token(10, 10, 4),
            web_token(10, 10, 5, first=","),
            web_token(10, 10, 5, second=","),
        ],
    ),
    (
        "a JSON web token",
        "ey" + "J" + chars(8) + "-_.ey" + "J" + chars(8) + "-_." + chars(3) + "-_",
        ["x" + web_token(10, 10, 5)],
    ),
    (
        "a password in a URL",
        "postgres://ann" + ":abc@db",
        ["postgres://ann" + ":ab@db", "postgres://ann@db", "postgres://ann" + ":abc@"],
    ),
    ("a password in a URL", "redis://" + ":abc@h", ["redis://" + ":ab@h"]),
    (
        "a password in a URL",
        "a1+b.c-d://u" + ":pw1@-",
        ["x://u" + ":pw1@h", "a" + "b" * 21 + "://u" + ":pw1@h"],
    ),
    *(
        ("a password in a URL", f"a{sign}b://u" + ":pw1@h", [f"a{sign}b://a@b" + ":pw1@h"])
        for sign in "+.-7z"
    ),
    ("a password in a URL", "a" + "b" * 20 + "://u" + ":pw1@.h", ["ftp:/ann" + ":abc@h"]),
    ("a password in a URL", "https://" + "u" * 100 + ":abc@h", ["https://" + "u" * 101 + ":abc@h"]),
    ("a password in a URL", "https://u:" + "p" * 200 + "@h", ["https://u:" + "p" * 201 + "@h"]),
    (
        "a password in a URL",
        "https://u" + ":p:q@h",
        ["https://x.org:80/@y", "https://ann/x" + ":abc@h", "https://a b" + ":abc@h"],
    ),
    *(
        (
            "a password in a URL",
            "ftp://ann" + ":abc@h",
            [f"ftp://a{sign}n" + ":abc@h", "ftp://ann" + f":ab{sign}cd@h"],
        )
        for sign in "\"'<>{}$ "
    ),
    *(
        (
            "a key in an HTTP header",
            f"Authorization: {scheme} " + chars(16),
            [f"{start}: {scheme} " + chars(n) for start, n in HEADERS],
        )
        for scheme in ("Bearer", "Basic", "Token", "bearer", "TOKEN")
    ),
    (
        "a key in an HTTP header",
        '"authorization"' + ': "bearer ' + chars(10) + '+/_.=-"',
        ["authorization: digest " + chars(20)],
    ),
    (
        "a key in an HTTP header",
        "authorization" + "=basic " + chars(16),
        ["authorization basic " + chars(16)],
    ),
    (
        "a key in an HTTP header",
        "authorization" + ":token\t" + chars(16),
        ["authorization: basic" + chars(16)],
    ),
    (
        "a key in an HTTP header",
        "'Authorization'" + " : 'Bearer  " + chars(16),
        ["authorization: bearer " + chars(14) + "!" + chars(9)],
    ),
    (
        "an Azure key",
        "Account" + "Key=" + chars(38) + "+/==",
        ["Account" + "Key=" + chars(39), "Account" + "Key:" + chars(40)],
    ),
    ("an Azure key", "account" + "key=" + chars(40), ["account" + "-key=" + chars(40)]),
]


@pytest.mark.parametrize(
    ("kind", "example", "near_misses"), CASES, ids=[f"{kind} {i}" for i, (kind, _, _) in enumerate(CASES)]
)
def test_a_key_is_recognised_by_its_form(kind: str, example: str, near_misses: list[str]) -> None:
    for text in (example, f"see ({example})", f"x = 1\r\n{example}\r\n"):
        assert kinds(text) == [kind], text
    for text in near_misses:
        assert kinds(text) == [], text


def test_each_form_has_cases() -> None:
    assert {kind for kind, _, _ in CASES} == set(leaks.TOKENS)


# -- values of names such as `password`

NAMES = words(
    "password passwd passphrase pwd secret token api_key api-key apikey access_key access-key accesskey "
    "auth_key auth-key authkey private_key private-key privatekey credential"
)
OTHER_NAMES = words(
    "passage pass_ pw secre toke api.key apike access__key auth.key privat_key credentia key user"
)
PASSWORDS = ("pass", "pwd")


def spellings() -> Iterator[str]:
    for name in NAMES:
        yield from (name, name.upper(), f"{name}s")


@pytest.mark.parametrize("name", list(spellings()))
def test_a_value_next_to_a_telling_name(name: str) -> None:
    expected = [f"a value for {name.lower().removesuffix('s')}"]
    for text in (
        f'{name} = "{chars(16)}"',
        f"{name}={chars(16)}",
        f"MY_{name}: {chars(16)}",
        f'{{"{name}": "{chars(16)}"}}',
    ):
        assert kinds(text) == expected, text
    short = chars(7) if name.lower().startswith(PASSWORDS) else chars(15)
    assert kinds(f"{name}={short}") == []


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_value_next_to_another_name(name: str) -> None:
    for text in (f'{name} = "{chars(16)}"', f"{name}={chars(16)}"):
        assert kinds(text) == []


def row(text: str, found: bool, note: str) -> object:
    return pytest.param(text, found, id=note)


PASS, TOKEN = "pass" + "word", "tok" + "en"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        row(PASS + ' = "abcdef"', True, "a quoted password needs no digit"),
        row(PASS + ' = "abcde"', False, "but six characters"),
        row("pwd" + " = 'abcdef'", True, "pwd is a password"),
        row(TOKEN + ' = "abcdefghijklmnopqrst"', False, "a token needs a digit"),
        row(TOKEN + ' = "12345678901234567890"', False, "and a letter"),
        row(TOKEN + f' = "{chars(15)}"', False, "and 16 characters"),
        row(TOKEN + f' = "{chars(16)}"', True, "16 are enough"),
        row(TOKEN + ' = "aabbaabbaabbaab1"', False, "and more entropy"),
        row(PASS + "=" + chars(8), True, "a password of eight characters without quotes"),
        row(PASS + "=" + chars(7), False, "not of seven"),
        row(PASS + "=abcdefghij", False, "a value without quotes needs a digit"),
        row(PASS + "=0123456789", False, "and a letter"),
        row("pwd" + "=" + chars(8), True, "pwd without quotes"),
        *(
            row(PASS + f"={letters}12345", True, f"letters such as {letters}")
            for letters in words("bcdef BCDEF azazz AZAZZ")
        ),
        row(PASS + "=aabbcd12", False, "2.5 bits per character are too few"),
        row(PASS + "=aabcde12", True, "2.75 are enough"),
        row(PASS + "='" + "a1" + "b" * 498 + "'", True, "500 characters"),
        row(PASS + "='" + "a1" + "b" * 499 + "'", False, "at most 500"),
        row(PASS + "=" + chars(500), True, "500 characters without quotes"),
        row(PASS + "=" + chars(501), False, "at most 500 without quotes"),
        row(PASS + " " * 9 + "=" + " " * 9 + "'abcdef'", True, "nine spaces"),
        row(PASS + " " * 10 + "='abcdef'", False, "not ten before"),
        row(PASS + "=" + " " * 10 + "'abcdef'", False, "not ten after"),
        row(PASS + " " * 9 + ":" + " " * 9 + chars(8), True, "nine spaces, without quotes"),
        row(PASS + " " * 10 + ":" + chars(8), False, "not ten before, without quotes"),
        row(PASS + ":" + " " * 10 + chars(8), False, "not ten after, without quotes"),
        row(PASS + "\t:\t" + chars(8), True, "tabs, without quotes"),
        row(PASS + """='ab"cdefgh'""", False, "another quote inside"),
        row(PASS + '="ab","cdefgh"', False, "its own quote inside"),
        row(PASS + "='ab','cdefgh'", False, "its own single quote inside"),
        row(PASS + "\n=\n'abcdef'", True, "on several lines"),
        row(PASS + "\n=" + chars(8), False, "on several lines, without quotes"),
        row("x = {" + PASS + "='abcdef'}", True, "inside a line"),
        row("x = " + PASS + "=" + chars(8), False, "inside a line, without quotes"),
        row(PASS + "=" + chars(8) + " # note", False, "before a comment"),
        row(PASS + "=" + chars(8) + " \t\r", True, "before spaces"),
        row(" \t" * 49 + "x" + PASS + "=" + chars(8), True, "after many spaces and tabs"),
        row(" " * 99 + PASS + "=" + chars(8), True, "after 99 spaces"),
        row(" " * 100 + PASS + "=" + chars(8), False, "not after 100"),
        row("export " + PASS + "=" + chars(8), True, "exported"),
        row("export\t MY_" + PASS + "=" + chars(8), True, "exported with a tab"),
        row("set " + PASS + "=" + chars(8), False, "another command"),
        row("EXPORT " + PASS + "=" + chars(8), True, "in capitals"),
        row("x" * 60 + PASS + "=" + chars(8), True, "after 60 letters"),
        row("x" * 61 + PASS + "=" + chars(8), False, "not after 61"),
        row("db.my-" + PASS + "=" + chars(8), True, "after a dot and a dash"),
        row("db/" + PASS + "=" + chars(8), False, "not after a slash"),
        row("first: 1\n" + PASS + "=" + chars(8) + "\nlast: 2", True, "on a line of its own"),
        *(
            row(PASS + f" = {prefix}'abcdef'", True, f"with {prefix} before the quote")
            for prefix in ("b", "r", "u", "rb", "BR")
        ),
        row(PASS + " = brb'abcdef'", False, "not three letters"),
        row(PASS + " = f'abcdef'", False, "an f-string is an expression"),
        row(PASS + "' : 'abcdef'", True, "a quoted name"),
        row(PASS + "'' : 'abcdef'", False, "quoted once"),
        row(PASS + " 'abcdef'", False, "without a sign"),
        row(PASS + " = 'abc def'", False, "with a space inside"),
        *(
            row(PASS + "=" + chars(4) + sign + chars(8), False, f"an expression with {sign}")
            for sign in "\"'#()[]{},;"
        ),
        *(row(PASS + f' = "abc{sign}def"', False, f"a placeholder with {sign}") for sign in "{}$<>*%"),
        row(PASS + ' = "abc...def"', False, "three dots"),
        row(PASS + ' = "abc..def"', True, "two dots"),
        *(
            row(PASS + f' = "{word}{case}"', False, f"a placeholder, {word}{case}")
            for word in words("example your_ your- changeme placeholder dummy xxxx Example CHANGEME XxXx")
            for case in ("abcdef", "123456")
        ),
        row(PASS + ' = "abc.x.def"', True, "dots that are apart"),
        row(PASS + ' = "yourabcdef"', True, "your without a dash"),
        *(
            row(PASS + f' = "{word}1"', True, f"no placeholder, {word}")
            for word in words("xample exampl our-a hangeme changem laceholder placeholde ummyab dummab xxx-x")
        ),
        row(PASS + ' = "xxxabcdef"', True, "three x"),
    ],
)  # fmt: skip
def test_a_value_differs_from_an_expression_or_a_placeholder(text: str, found: bool) -> None:
    if text.startswith(TOKEN):
        name = TOKEN
    elif PASS in text:
        name = PASS
    else:
        name = "pwd"
    assert kinds(text) == ([f"a value for {name}"] if found else [])


# -- line numbers

A_VALUE = f"a value for {PASS}"
A_TOKEN = "h" + "f_" + chars(34)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_line_number_in_any_encoding(encoding: str) -> None:
    text = f"{A_TOKEN}\n\n# {A_TOKEN} {A_TOKEN}\n{PASS} = '{chars(9)}'\n{PASS}: {chars(9)}"
    places = [
        (1, "a Hugging Face token"),
        (3, "a Hugging Face token"),
        (3, "a Hugging Face token"),
        (4, A_VALUE),
        (5, A_VALUE),
    ]
    assert list(leaks.secrets_in(text.encode(encoding))) == places
    assert list(leaks.secrets_in(f"\n{text}".encode(encoding))) == [(line + 1, kind) for line, kind in places]


def test_text_without_secrets() -> None:
    assert list(leaks.secrets_in(b"")) == []
    assert kinds("import os\n\nkey = os.environ['" + TOKEN.upper() + "']\n") == []
