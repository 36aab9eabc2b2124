"""The main function of the scripts that make a campaign."""

import logging
from collections.abc import Sequence

from campaign import tables, work
from campaign.runs import Campaign, parse_arguments


def main(campaign: Campaign, description: str | None, argv: Sequence[str] | None = None) -> int:
    """Make the runs that are left, unless only a report is asked for; write the report; return the exit status."""
    args = parse_arguments(campaign, description, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    failed = 0 if args.report else work.work(campaign, args)
    tables.report(campaign, args.csv)
    return 1 if failed else 0
