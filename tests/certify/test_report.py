"""Reports: figures, storage, verification."""

import dataclasses
import os
import time

import pytest

from hf_certify import Certificate, CertificationReport, CertifyConfig, ReportFolderError, VerificationError
from hf_certify.storage import REPORT_FILE, write_report

VOTES = [
    ([90, 8, 2], [970, 20, 10]),
    ([10, 80, 10], [100, 850, 50]),
    ([40, 35, 25], [450, 400, 150]),
    ([1, 2, 97], [0, 0, 1000]),
]


def make_report(interval: str = "max_upper", **settings: object) -> CertificationReport:
    config = CertifyConfig(sigma=0.5, n=1000, interval=interval, seed=2**127 + 1, batch_size=64)
    certificates = tuple(
        Certificate.from_counts(*votes, sigma=0.5, interval=interval, index=index) for index, votes in enumerate(VOTES)
    )
    return CertificationReport(certificates=certificates, config=config, facts={"model": "ünit"}, **settings)


def test_certified_accuracy_counts_right_classes_with_at_least_the_radius():
    """Oracle: the definition, over radii read off the certificates."""
    report = make_report()
    radii = [certificate.radius for certificate in report.certificates]
    assert radii[3] > radii[0] > radii[1] > radii[2] == 0
    labels = [0, 1, 0, 1]
    assert report.certified_accuracy(labels, [0, radii[1], radii[0], radii[0] + 1e-9]) == (0.5, 0.5, 0.25, 0.0)
    assert report.certified_accuracy([0, 1, 0, 2], [0.0]) == (0.75,)
    assert report.average_certified_radius(labels) == pytest.approx((radii[0] + radii[1]) / 4)
    assert report.abstentions == 1
    assert report.draws_per_input == 1100


def test_an_abstention_is_never_right():
    assert make_report().certified_accuracy([1, 0, 0, 0], [0.0]) == (0.0,)


def test_labels_must_match_the_inputs():
    with pytest.raises(ValueError, match="one class for each of 4 inputs, got 2"):
        make_report().certified_accuracy([0, 1])


def test_a_report_survives_the_disk_byte_for_byte(tmp_path):
    report = make_report()
    path = report.save(tmp_path / "a" / "b")
    loaded = CertificationReport.load(tmp_path / "a" / "b")
    assert loaded == report
    loaded.verify()
    assert loaded.save(tmp_path / "c").read_bytes() == path.read_bytes()


def test_a_folder_with_something_in_it_is_refused_unless_told_otherwise(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ReportFolderError, match=r"must be empty or new, got .* pass overwrite"):
        make_report().save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    make_report().save(tmp_path, overwrite=True)
    make_report("cohen").save(tmp_path, overwrite=True)
    assert CertificationReport.load(tmp_path).config.interval == "cohen"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportFolderError, match=r"must be writable, got '.*file/report'"):
        make_report().save(tmp_path / "file" / "report")


def test_a_crash_while_writing_leaves_the_old_report(tmp_path, monkeypatch):
    make_report().save(tmp_path)
    before = (tmp_path / REPORT_FILE).read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(ReportFolderError, match=r"could not be written .* disk full"):
        make_report("cohen").save(tmp_path, overwrite=True)
    assert (tmp_path / REPORT_FILE).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [REPORT_FILE]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        "\xff",
        "{}",
        '{"schema": 1}',
        '{"schema": true}',
        '{\n "schema": 3.0\n}\n',
        "9" * 5000,
    ],
)
def test_files_that_are_not_reports_are_refused(text, tmp_path):
    (tmp_path / REPORT_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ReportFolderError, match=r"must hold|must have schema 3"):
        CertificationReport.load(tmp_path)


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(ReportFolderError, match=r"must hold a readable report\.json"):
        CertificationReport.load(tmp_path)


def test_an_unknown_setting_voids_a_stored_report(tmp_path):
    values = make_report().to_dict()
    values["config"]["temperature"] = 2
    write_report(tmp_path, values)
    with pytest.raises(ReportFolderError, match=r"got also \['temperature'\]"):
        CertificationReport.load(tmp_path)


def test_tampered_votes_are_found_after_loading(tmp_path):
    values = make_report().to_dict()
    values["certificates"][1]["estimation"] = [50, 900, 50]
    write_report(tmp_path, values)
    with pytest.raises(VerificationError, match="Certificate 1 must follow from its votes"):
        CertificationReport.load(tmp_path).verify()


@pytest.mark.parametrize("change", [{"alpha": 0.01}, {"sigma": 1.0}, {"n": 1001}, {"n0": 99}, {"interval": "cpm"}])
def test_certificates_must_have_the_settings_of_their_report(change):
    report = make_report()
    changed = dataclasses.replace(report, config=dataclasses.replace(report.config, **change))
    with pytest.raises(VerificationError, match="must have the settings of its report"):
        changed.verify()


def test_certificates_must_be_complete_and_in_order():
    report = make_report()
    with pytest.raises(VerificationError, match=r"must be about input and answer \(0, None\), got \(1, None\)"):
        dataclasses.replace(report, certificates=report.certificates[1:]).verify()
    with pytest.raises(VerificationError, match="at least one certificate"):
        dataclasses.replace(report, certificates=()).verify()
    with pytest.raises(VerificationError, match="must have margin 'mono'"):
        dataclasses.replace(report, config=dataclasses.replace(report.config, margin="mono")).verify()


@pytest.mark.parametrize("interval", ["cohen", "bonferroni", "cpm", "max_upper"])
def test_another_rule_on_the_same_votes_verifies_and_says_where_it_comes_from(interval):
    """Oracle: the report that this rule would have given at first."""
    derived = make_report("cohen").with_interval(interval)
    derived.verify()
    assert derived.certificates == make_report(interval).certificates
    assert derived.derived_from == (None if interval == "cohen" else "cohen")
    assert ("for comparison only" in derived.summary()) == (interval != "cohen")


def test_another_margin_is_another_rule():
    derived = make_report("cpm").with_interval("cpm", margin="mono")
    derived.verify()
    assert derived.derived_from == "cpm"
    assert [c.radius for c in derived.certificates] == [c.radius for c in make_report("cohen").certificates]


def test_a_thousand_certificates_verify_in_under_a_second():
    certificate = make_report().certificates[0]
    certificates = tuple(dataclasses.replace(certificate, index=index) for index in range(1000))
    report = dataclasses.replace(make_report(), certificates=certificates)
    start = time.perf_counter()
    report.verify()
    assert time.perf_counter() - start < 1.0


def test_summary_cuts_figures_off_and_states_the_guarantee():
    text = make_report().summary([0, 1, 0, 1])
    assert "certified accuracy at l2 radius  0: 0.500" in text
    assert "abstentions 1" in text
    assert "any of the 4 with at most 0.004" in text
    assert "smoothed classifier" in text
    assert "certified share at l2 radius  0: 0.750" in make_report().summary()


def test_an_abstention_is_never_counted_as_right_whatever_the_label():
    """Oracle: the third input abstains, and no label makes it right; the share at radius 0 counts the other three."""
    for label in range(3):
        assert make_report().certified_accuracy([0, 1, label, 2], [0.0]) == (0.75,)
    with pytest.raises(ValueError, match="got None for input 2"):
        make_report().certified_accuracy([0, 1, None, 2])
    assert "certified share at l2 radius  0: 0.750" in make_report().summary()


def test_the_printed_risk_of_all_certificates_is_rounded_up():
    """Oracle: 4 * 0.0012345 = 0.004938, whose third digit rounds up."""
    report = dataclasses.replace(make_report(), config=CertifyConfig(sigma=0.5, alpha=0.001_234_5))
    assert "any of the 4 with at most 0.00494;" in report.summary()


def test_facts_that_are_not_plain_are_refused_and_leave_no_file(tmp_path):
    for value in (tmp_path, float("nan"), {1, 2}):
        report = dataclasses.replace(make_report(), facts={"model": value})
        with pytest.raises(ReportFolderError, match="must hold plain values only"):
            report.save(tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


def test_an_interruption_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_report().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_name_that_is_not_utf8_survives_the_disk(tmp_path):
    report = make_report()
    named = dataclasses.replace(report.certificates[0], source=os.fsdecode(b"caf\xe9.png"))
    report = dataclasses.replace(report, certificates=(named, *report.certificates[1:]))
    report.save(tmp_path)
    assert CertificationReport.load(tmp_path) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(facts=None), "facts must be a JSON object"),
        (lambda v: v["facts"].update(labels=["a", "b", "c"]), "labels must hold one name for each of 3 classes"),
        (lambda v: v["facts"].update(labels={"0": "a", "1": "b"}), "labels must hold one name for each of 3 classes"),
        (lambda v: v["facts"].update(labels={"0": "a", "1": "b", "2": 3}), "labels must hold one name"),
        (lambda v: v.update(signed=True), "must hold the keys"),
        (lambda v: v.pop("derived_from"), "must hold the keys"),
        (lambda v: v.update(derived_from="trust me"), "derived_from must be null or the name of a rule"),
        (lambda v: v["config"].pop("batch_size"), "config must hold the keys"),
        (lambda v: v.update(config=[]), "config must hold the keys"),
        (lambda v: v["config"].update(n=1000.0), "n must be an int"),
        (lambda v: v["certificates"].pop(), "list of count=4 items"),
        (lambda v: v.update(count=4.0), "list of count=4.0 items"),
        (lambda v: v.update(certificates={}), "list of count=4 items"),
        (lambda v: v["certificates"].__setitem__(1, None), "is damaged"),
        (lambda v: v["certificates"][0].update(label=False), "label must be int or NoneType, got False"),
        (lambda v: v["certificates"][0].update(n=1000.0), "n must be int, got 1000.0"),
        (lambda v: v["certificates"][0].update(source=3), "source must be str or NoneType, got 3"),
        (lambda v: v["certificates"][2].update(radius=0), "radius must be float, got 0"),
        (lambda v: v["certificates"][0].update(estimation=[970, 20, True]), "Votes must be int"),
        (lambda v: v["certificates"][0].update(estimation=[970, 30]), "must have the same number of classes"),
        (lambda v: v["certificates"][0].pop("alpha"), "must hold the keys"),
    ],
)
def test_a_stored_report_must_have_exactly_the_known_keys_and_types(change, message, tmp_path):
    """Negative control: without the change the same values load."""
    values = make_report().to_dict()
    write_report(tmp_path, values)
    CertificationReport.load(tmp_path).verify()
    change(values)
    write_report(tmp_path, values)
    with pytest.raises(ReportFolderError, match=f"is damaged: .*{message}" if message != "is damaged" else message):
        CertificationReport.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"n0": 100,', '"n0": 99, "n0": 100,'),
        ('"n0": 100,', '"n0":  100,'),
        ('"sigma": 0.5', '"sigma": 0.50'),
        ("\\u00fc", "\u00fc"),
        ('"sigma": 0.5', '"sigma": NaN'),
    ],
)
def test_bytes_that_save_would_not_have_written_are_refused(old, new, tmp_path):
    path = make_report().save(tmp_path)
    text = path.read_text("ascii")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ReportFolderError, match=r"byte for byte|plain values only"):
        CertificationReport.load(tmp_path)


def test_certificates_of_different_numbers_of_classes_do_not_verify():
    report = make_report()
    other = Certificate.from_counts([90, 10], [900, 100], sigma=0.5, index=1)
    changed = dataclasses.replace(report, certificates=(report.certificates[0], other, *report.certificates[2:]))
    with pytest.raises(VerificationError, match="as many classes as the first, 3, got 2"):
        changed.verify()
