import os

import pytest

from tenure.errors import CorruptData, NotFound, SpecError
from tenure.forms import Form, FormRecord, ImageManifest
from tenure.images.store import ImageStore, read_image, with_measures, write_manifest

RECORD = FormRecord(path="root", size_bytes=10, sha256="0" * 64)


def manifest(name="digits", digit="a", **fields):
    return ImageManifest(
        name=name, id=digit * 64, closure_hash="0" * 64, entry=("/bin/x",), **{"forms": {Form.ROOT: RECORD}} | fields
    )


def put(store, **fields):
    with store.building() as folder:
        (folder / "root").mkdir()
        return store.adopt(folder, manifest(**fields))


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


def test_an_image_is_found_by_name_by_id_and_by_folder(store):
    first, second = put(store), put(store, digit="b")
    os.utime(first.folder / "image.json", (1, 1))
    assert store.find("digits").manifest.id == second.manifest.id, "the newest"
    assert store.find("digits:aaaa").folder == first.folder
    assert store.find("aaaaaa").folder == first.folder
    assert store.find(str(first.folder)).manifest == first.manifest
    assert [image.manifest.id[0] for image in store.images()] == ["b", "a"]


def test_what_is_not_there_or_fits_several_is_told_with_what_there_is(store):
    put(store, digit="a")
    put(store, name="other", digit="a")
    with pytest.raises(NotFound, match="there are: "):
        store.find("nothing")
    with pytest.raises(SpecError, match="fits several images"):
        store.find("aaaa")
    with pytest.raises(NotFound, match="only: root"):
        store.find("other").form_path(Form.OCI)
    assert ImageStore(store.folder / "empty").images() == ()


def test_a_damaged_manifest_is_named_and_hides_no_other(store):
    image = put(store)
    other = put(store, name="other")
    (image.folder / "image.json").write_text('{"name": "DIGITS"')
    with pytest.raises(CorruptData, match="Build the image anew"):
        read_image(image.folder)
    assert [each.folder for each in store.images()] == [other.folder]


def test_the_same_image_built_again_keeps_the_forms_it_had(store):
    put(store)
    with store.building() as folder:
        (folder / "image.oci.tar").write_text("archive")
        oci = FormRecord(path="image.oci.tar", size_bytes=7, sha256="1" * 64)
        image = store.adopt(folder, manifest(forms={Form.OCI: oci}))
    assert set(image.manifest.forms) == {Form.ROOT, Form.OCI}
    assert sorted(os.listdir(image.folder)) == ["image.json", "image.oci.tar", "root"]


def test_nothing_is_left_of_a_build_that_fails_or_whose_builder_died(store):
    def fail():
        with store.building() as folder:
            (folder / "root").mkdir()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    dead = store.folder / ".building-999999999-abcd1234"
    dead.mkdir()
    with store.building() as folder:
        assert os.listdir(store.folder) == [folder.name]
    assert os.listdir(store.folder) == []


def test_a_removed_image_is_gone_whole(store):
    image, other = put(store), put(store, digit="b")
    store.remove(image)
    assert [each.folder for each in store.images()] == [other.folder]
    store.remove(other)
    assert os.listdir(store.folder) == []


def test_what_was_measured_of_a_form_stays_with_it(store):
    image = with_measures(put(store), Form.ROOT, cold_start_s=0.5)
    image = with_measures(image, Form.ROOT, memory_floor_bytes=1 << 27)
    record = store.find("digits").manifest.forms[Form.ROOT]
    assert (record.cold_start_s, record.memory_floor_bytes) == (0.5, 1 << 27)
    with pytest.raises(NotFound):
        with_measures(image, Form.OCI, cold_start_s=1.0)


def test_a_manifest_reads_the_same_as_it_was_written(store, tmp_path):
    whole = manifest(env={"A": "1"}, ports=(8000,), door="v2", system_calls=("read",), seccomp="seccomp.json", workdir="/srv")
    write_manifest(tmp_path, whole)
    assert read_image(tmp_path).manifest == whole
