"""Parts of a report that test_benchmark_gpu.py runs. This module imports nothing heavy, as a new process imports it."""

import os
import subprocess
import time


def quick(number, results, send):
    send({"number": number, "states": [result["state"] for result in results.values()]})
    print("this line is for the log")


def slow(number, results, send):
    process = subprocess.Popen(["sleep", "60"])
    send({"process": process.pid})
    time.sleep(60)


def failing(number, results, send):
    send({"first": 1})
    raise ValueError("what is wrong\nand more of it")


def crashing(number, results, send):
    send({"first": 1})
    os._exit(3)
