"""The batched echo as a Mosec service: `python -m bench.mosec_server --address 127.0.0.1 --port 8000`."""

from __future__ import annotations

from mosec import Server, Worker

from bench.traffic import LARGEST, WINDOW_S


class Echo(Worker):
    """Takes and gives lists of decoded JSON values."""

    def forward(self, data):
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Echo, num=1, max_batch_size=LARGEST, max_wait_time=round(WINDOW_S * 1000))
    server.run()
