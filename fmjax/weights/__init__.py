"""Readers of other libraries' files, without pickle."""

from .state_dicts import check_entries as check_entries
from .torch_files import read_tensors as read_tensors
