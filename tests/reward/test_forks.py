"""Pairs in one row: by hand, and the same rewards and gradients as rows of their own, for every family."""

import pytest
import torch
from families import FAMILIES, make_model

from irlign.data.chat import Encoded, pad
from irlign.reward.forks import BETTER, NONE, SHARED, WORSE, can_fork, collate, read, visible
