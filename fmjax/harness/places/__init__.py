"""Run folders, on a disk or in a bucket; what needs gcsfs is imported where it is used."""

from .folders import Folder as Folder
from .folders import as_path as as_path
from .folders import at_hand as at_hand
from .folders import check_name as check_name
from .folders import check_shared as check_shared
from .folders import exchange as exchange
from .folders import in_bucket as in_bucket
from .folders import place as place
