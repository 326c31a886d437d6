"""What a deployment may ask of an upload beyond that it runs."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import pytest

from serve.adapters.adapter import NOTES
from serve.adapters.provenance import front_matter, read_license
from serve.config import load
from serve.errors import ConfigError
from tests.support.app import upload

CARD = "---\nbase_model: base\nlicense: Apache-2.0\ntags: [lora]\n---\n# Tone\n"


def archive(folder, prefix="tone/"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, prefix + file.name)
    return {"data": {"name": "tone"}, "files": [("files", ("tone.tar.gz", packed.getvalue()))]}


async def push(connect, config, make, pack=upload, **settings):
    async with connect(replace(config, **settings)) as client:
        response = await client.post("/v1/adapters", **pack(make))
        return response.status_code, response.json()


async def test_a_rank_above_what_the_deployment_takes_is_refused(connect, config, make_adapter):
    status, body = await push(connect, config, make_adapter(rank=4), max_adapter_rank=2)
    assert status == 422 and "rank 4 is above the 2" in body["error"]["message"]
    assert (await push(connect, config, make_adapter(rank=2), max_adapter_rank=2))[0] == 201


async def test_modules_that_the_deployment_does_not_allow_are_named(connect, config, make_adapter):
    status, body = await push(connect, config, make_adapter(), allowed_target_modules=("v_proj",))
    assert status == 422 and "`q_proj`; this server allows v_proj" in body["error"]["message"]
    assert (await push(connect, config, make_adapter(), allowed_target_modules=("q_proj", "v_proj")))[0] == 201


async def test_only_approved_digests_pass_where_a_list_is_set(connect, config, make_adapter):
    status, body = await push(connect, config, make_adapter(), allowed_digests=("0" * 64,))
    assert status == 422 and "among the digests" in body["error"]["message"]
    assert not list((config.data_dir / "blobs").iterdir())
    digest = body["error"]["message"].split()[0]
    assert (await push(connect, config, make_adapter(), allowed_digests=(digest,)))[0] == 201


@pytest.mark.parametrize("pack", [upload, archive])
async def test_the_license_is_read_from_the_card_and_shown(connect, config, make_adapter, pack):
    folder = make_adapter()
    status, body = await push(connect, config, folder, pack, allowed_licenses=("Apache-2.0", "mit"))
    assert status == 422 and "states no license" in body["error"]["message"]
    (folder / "README.md").write_text(CARD)
    status, body = await push(connect, config, folder, pack, allowed_licenses=("mit",))
    assert status == 422 and "its license is apache-2.0; this server takes mit" in body["error"]["message"]
    status, body = await push(connect, config, folder, pack, allowed_licenses=("Apache-2.0", "mit"))
    assert status == 201 and body["checks"]["license"] == "apache-2.0"


@pytest.mark.parametrize("pack", [upload, archive])
async def test_a_card_is_no_part_of_the_bytes_and_its_size_does_not_matter(client, config, make_adapter, pack):
    folder = make_adapter()
    bare = (await client.post("/v1/adapters", **pack(folder))).json()
    (folder / "README.md").write_text(CARD + "x" * 3 * NOTES["README.md"])
    again = await client.post("/v1/adapters", **pack(folder))
    assert (again.status_code, again.json()["digest"]) == (200, bare["digest"])
    assert not list((config.data_dir / "quarantine").iterdir())


@pytest.mark.parametrize(
    ("text", "license"),
    [
        (CARD, "apache-2.0"),
        (CARD.replace("\n", "\r\n"), "apache-2.0"),
        ('---\nlicense: "mit" # ours\n---', "mit"),
        ("# license: mit\n", None),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\ntitle: x\n---\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),
    ],
)
def test_only_the_front_matter_states_a_license(tmp_path, text, license):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_license(front_matter(tmp_path / "README.md")) == license


def test_a_digest_that_is_none_is_a_sentence():
    with pytest.raises(ConfigError, match="allowed_digests"):
        load(["--allowed-digests", "abc"], {})
