"""What trains, and what its stages share."""

from stages.devices import silence_deepspeed

silence_deepspeed()  # before any stage imports a library that imports DeepSpeed
