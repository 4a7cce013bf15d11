"""Readers of other libraries' files, without pickle, and the export of our own."""

from .export import export_safetensors as export_safetensors
from .export import load_safetensors as load_safetensors
from .state_dicts import check_entries as check_entries
from .torch_files import read_tensors as read_tensors
