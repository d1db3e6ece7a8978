"""Words by which people name columns, folders and parts of file names."""

from __future__ import annotations

import re

TIMES = ("t", "ts", "time", "timestamp", "times", "datetime", "date", "seconds", "epoch", "clock", "zeit")
LABELS = (
    *("label", "labels", "activity", "class", "target", "y", "stage", "sleep_stage", "state", "condition", "behavior"),
    *("behaviour", "annotation", "event", "task", "exercise", "posture", "gesture", "category", "ground_truth", "gt"),
)
SUBJECTS = ("subject", "who", "person", "participant", "user", "patient", "proband", "pid", "sid", "id", "volunteer")
SESSIONS = ("session", "trial", "run", "visit", "recording", "repetition", "rep", "day", "night", "experiment")
STARTS = ("start", "begin", "onset", "from", "start_time", "starttime", "t_start", "tstart", "begin_time")
ENDS = ("end", "stop", "offset", "to", "until", "end_time", "endtime", "t_end", "tend", "stop_time")
RATES = ("fs", "rate", "sampling_rate", "sample_rate", "samplingrate", "samplerate", "srate", "sfreq", "freq", "hz")
SENSORS = (
    *("acc", "accel", "accelerometer", "acceleration", "gyr", "gyro", "gyroscope", "mag", "magnetometer", "hr", "bvp"),
    *("eda", "gsr", "temp", "temperature", "ecg", "ekg", "eeg", "emg", "eog", "ppg", "ibi", "resp", "spo2", "imu"),
)
ACTIVITIES = (
    *("walk", "run", "jog", "sit", "stand", "lie", "lying", "lay", "stair", "cycl", "bik", "sleep", "rest", "fall"),
    *("jump", "wake", "stress", "relax", "baseline", "normal", "healthy", "squat", "push", "eat", "drink", "driv"),
    *("climb", "down", "up", "still", "idle", "geh", "sitz", "steh", "lieg", "lauf"),
)
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation")
OF_SUBJECT = re.compile(
    r"(s|p|u|vp|id|sub|subj|subject|user|pers|person|participant|patient|pat|proband|volunteer)[-_ ]?[0-9]+",
    re.IGNORECASE,
)
OF_SESSION = re.compile(
    r"(session|sess|ses|run|trial|rep|visit|v|day|night|t|take|exp|record|rec|recording)[-_ ]?[0-9]+", re.IGNORECASE
)
OF_UNIT = re.compile(r"(?:.*[_\s(\[])?(s|sec|secs|seconds|ms|us|µs|ns|millis)[)\]]?", re.IGNORECASE)
UNIT = {"sec": "s", "secs": "s", "seconds": "s", "µs": "us", "millis": "ms"}


def among(name: str, words: tuple[str, ...]) -> bool:
    """Return whether a name is one of the words, in any case, or begins or ends with one: 'activity_id'."""
    plain = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
    parts = [part for part in re.split(r"[^a-zµ0-9]+", plain) if part]
    joined = "_".join(parts)
    ends = {part for part in (*parts[:1], *parts[-1:]) if len(part) > 1}  # the y of acc_y is no label
    return joined in words or (len(parts) <= 3 and not ends.isdisjoint(words))


def unit_in(name: str) -> str | None:
    """Return the unit that a column's name states, such as 'ms' of 'time_ms' or 'Time (s)'; None where it has none."""
    hit = OF_UNIT.fullmatch(name.strip())
    return UNIT.get(hit[1].lower(), hit[1].lower()) if hit else None
