"""A real sound server in user space: what is played into its null sink is what its microphone hears."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import soundfile


class SoundServer:
    """PulseAudio, which PortAudio reaches through ALSA's plugin. ``environment`` is for who records and plays."""

    def __init__(self, folder: Path, rate_hz: int = 48_000, channels: int = 2) -> None:
        config = folder / "asound.conf"
        config.write_text("pcm.!default { type pulse }\nctl.!default { type pulse }\n")
        self._folder, self._socket = folder, folder / "pulse.socket"
        self.environment = {
            **os.environ,
            "ALSA_CONFIG_PATH": str(config),
            "PULSE_SERVER": f"unix:{self._socket}",
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
        }
        self._playing: list[subprocess.Popen[bytes]] = []
        self._modules = [
            f"module-null-sink sink_name=cable rate={rate_hz} channels={channels} norewinds=1",
            f"module-native-protocol-unix socket={self._socket} auth-anonymous=1",
        ]
        self.start()

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        loads = [argument for module in self._modules for argument in ("-L", module)]
        self._process = subprocess.Popen(
            ["pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1", *loads],
            env=self.environment,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 10
        while self.control("info").returncode:
            assert time.monotonic() < deadline_s, "pulseaudio does not start"
            time.sleep(0.05)
        self.control("set-default-source", "cable.monitor")

    def control(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["pactl", *command], env=self.environment, capture_output=True, timeout=10)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def play(self, path: Path) -> subprocess.Popen[bytes]:
        self._playing.append(subprocess.Popen(["paplay", str(path)], env=self.environment, stderr=subprocess.DEVNULL))
        return self._playing[-1]

    def play_tone(self, hz: float, seconds: float = 30.0) -> subprocess.Popen[bytes]:
        path = self._folder / f"{hz:g}.wav"
        tone = 0.2 * np.sin(2 * np.pi * hz * np.arange(int(44_100 * seconds)) / 44_100)
        soundfile.write(path, tone, 44_100)
        return self.play(path)

    def close(self) -> None:
        for player in self._playing:
            player.kill()
            player.wait()
        self.stop()
