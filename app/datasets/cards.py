"""Simulated card transactions with fraud, after the simulator of the Fraud Detection Handbook.

The idea, the column names and the figures below are those of the Handbook (Le Borgne, Siblini, Lebichot
and Bontempi, "Reproducible Machine Learning for Credit Card Fraud Detection", chapter 3); the code and
the random streams are our own, so the rows are others and their statistics the same.

One day is made at a time, all customers at once, so memory does not grow with the number of days.
"""

from collections.abc import Iterator
from datetime import UTC, date, datetime
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from app.datasets import UTC_MS, Progress, required, write_parquet
from models.errors import HeadraceError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SIDE = 100.0  # customers and terminals lie in a square of this side
RADIUS = 5.0  # a customer uses the terminals that are nearer to home than this
MEAN_AMOUNT = (5.0, 100.0)  # a customer's mean amount; its deviation is half of it
MAX_RATE = 4.0  # a customer's transactions a day: between 0 and this, on average
NOON_S, SPREAD_S = 43_200, 20_000  # time of day: mean and deviation, seconds
DAY_S = 86_400
HIGH_AMOUNT_CENTS = 22_000  # scenario 1: an amount above this is fraud
TERMINALS_A_DAY, TERMINAL_DAYS = 2, 28  # scenario 2: newly compromised each day, and for how long
CUSTOMERS_A_DAY, CUSTOMER_DAYS = 3, 14  # scenario 3: likewise
STOLEN_SHARE, STOLEN_FACTOR = 1 / 3, 5  # scenario 3: this share is the thief's, at so many times the amount
LABEL_DELAY_MS = (3_600_000, 5 * 86_400_000)  # 1 hour to 5 days: below the 7 days that the features wait
PAIRS_AT_ONCE = 1_000_000  # distances held in memory at a time: about 40 MB

SCHEMA = pa.schema(
    [
        required("TRANSACTION_ID", pa.int64()),
        required("TX_DATETIME", UTC_MS),
        required("CUSTOMER_ID", pa.int64()),
        required("TERMINAL_ID", pa.int64()),
        required("TX_AMOUNT", pa.float64()),
        required("TX_FRAUD", pa.int8()),
        required("TX_FRAUD_SCENARIO", pa.int8()),
        required("LABEL_TS", UTC_MS),
    ]
)


class CardsRefused(HeadraceError):
    """The simulation was asked for something that it cannot make."""


class City(NamedTuple):
    """Who buys, how much and where. Customer c uses the terminals near[first[c] : first[c] + reach[c]]."""

    rate: Floats  # transactions a day
    mean: Floats  # amount
    near: Ints
    first: Ints
    reach: Ints


class Thieves(NamedTuple):
    """Up to which day (exclusive) each terminal and each customer is compromised."""

    terminal_until: Ints
    customer_until: Ints


class Purchases(NamedTuple):
    """One day's transactions in order of time."""

    second: Ints  # of the day
    customer: Ints
    terminal: Ints
    cents: Ints


def write_cards(
    path: str | PathLike[str],
    *,
    customers: int = 5000,
    terminals: int = 10_000,
    start: str = "2018-04-01",
    days: int = 183,
    seed: int = 0,
    progress: Progress | None = None,
) -> int:
    """Write simulated transactions to a Parquet file in order of TX_DATETIME; returns the rows.

    The columns are SCHEMA's. The same arguments give the same rows, and more days only append to them
    (with one version of NumPy: it does not promise its streams across versions). The numbers of newly
    compromised terminals and customers are per day whatever the size of the city, so the share of fraud
    grows as the city shrinks. `progress` counts days. Raises CardsRefused for arguments out of range,
    DatasetNotWritten for a bad path.
    """
    first_day_s = _check(customers, terminals, start, days, seed)
    city = _city(np.random.default_rng([seed, 0]), customers, terminals)

    def tables() -> Iterator[pa.Table]:
        thieves = Thieves(np.zeros(terminals, np.int64), np.zeros(customers, np.int64))
        rows = 0
        for day in range(days):
            # A stream per day, so that a day does not depend on how many days are asked for.
            rng = np.random.default_rng([seed, 1 + day])
            table = _day(rng, city, thieves, day, midnight_s=first_day_s + day * DAY_S, first_id=rows)
            rows += table.num_rows
            yield table
            if progress:
                progress(day + 1, days)

    return write_parquet(Path(path), SCHEMA, tables())


def _check(customers: int, terminals: int, start: str, days: int, seed: int) -> int:
    """The first day in seconds since 1970; raises CardsRefused for arguments out of range."""
    for name, value, least in (
        ("customers", customers, CUSTOMERS_A_DAY),
        ("terminals", terminals, TERMINALS_A_DAY),
        ("days", days, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise CardsRefused(f"{name} is {value}, but must be at least {least}.")
    try:
        first = date.fromisoformat(start)
    except ValueError as error:
        raise CardsRefused(f"start is {start!r}, but must be a date such as 2018-04-01.") from error
    return int(datetime(first.year, first.month, first.day, tzinfo=UTC).timestamp())


def _city(rng: np.random.Generator, customers: int, terminals: int) -> City:
    rate = rng.uniform(0, MAX_RATE, customers)
    mean = rng.uniform(*MEAN_AMOUNT, customers)
    near, reach = neighbours(rng.uniform(0, SIDE, (customers, 2)), rng.uniform(0, SIDE, (terminals, 2)))
    rate[reach == 0] = 0  # nowhere to buy
    return City(rate, mean, near, np.cumsum(reach) - reach, reach)


def neighbours(homes: Floats, places: Floats) -> tuple[Ints, Ints]:
    """The places within RADIUS of each home, home after home, and how many each home has.

    homes: (n, 2), places: (m, 2); returns (k,) indices of places and (n,) counts that sum to k.
    """
    near: list[Ints] = []
    reach: list[Ints] = []
    step = max(1, PAIRS_AT_ONCE // len(places))
    for at in range(0, len(homes), step):
        dx = homes[at : at + step, None, 0] - places[:, 0]
        dy = homes[at : at + step, None, 1] - places[:, 1]
        within = dx * dx + dy * dy < RADIUS * RADIUS
        near.append(np.nonzero(within)[1])
        reach.append(within.sum(axis=1))
    return np.concatenate(near), np.concatenate(reach)


def _day(
    rng: np.random.Generator, city: City, thieves: Thieves, day: int, *, midnight_s: int, first_id: int
) -> pa.Table:
    """One day as SCHEMA has it. Marks in `thieves` who becomes compromised today."""
    bought = _purchases(rng, city)
    scenario, cents = _frauds(rng, bought, thieves, day)
    time_ms = (midnight_s + bought.second) * 1000
    label_ms = time_ms + rng.integers(*LABEL_DELAY_MS, size=len(time_ms), endpoint=True)
    columns = [
        np.arange(first_id, first_id + len(time_ms)),
        time_ms,
        bought.customer,
        bought.terminal,
        cents / 100,  # the float64 nearest to the decimal, as a reader of decimals would have it
        scenario > 0,
        scenario,
        label_ms,
    ]
    return pa.table([pa.array(c).cast(f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _purchases(rng: np.random.Generator, city: City) -> Purchases:
    customer = np.repeat(np.arange(len(city.rate)), rng.poisson(city.rate))
    second = np.floor(rng.normal(NOON_S, SPREAD_S, len(customer))).astype(np.int64)
    today = (second >= 0) & (second < DAY_S)
    customer, second = customer[today], second[today]

    mean = city.mean[customer]
    amount = rng.normal(mean, mean / 2)
    negative = amount < 0
    amount[negative] = rng.uniform(0, 2 * mean[negative])
    cents = np.rint(amount * 100).astype(np.int64)
    terminal = city.near[city.first[customer] + rng.integers(0, city.reach[customer])]

    order = np.argsort(second, kind="stable")  # of one second, the lower customer first
    return Purchases(second[order], customer[order], terminal[order], cents[order])


def _frauds(rng: np.random.Generator, bought: Purchases, thieves: Thieves, day: int) -> tuple[Ints, Ints]:
    """The fraud scenario (0 for none) and the final amount in cents of each transaction.

    Where several scenarios meet, the last one counts. The high amount is looked for before the thief
    multiplies it.
    """
    terminal_until, customer_until = thieves
    terminal_until[rng.choice(len(terminal_until), TERMINALS_A_DAY, replace=False)] = day + TERMINAL_DAYS
    customer_until[rng.choice(len(customer_until), CUSTOMERS_A_DAY, replace=False)] = day + CUSTOMER_DAYS
    stolen = (customer_until[bought.customer] > day) & (rng.random(len(bought.cents)) < STOLEN_SHARE)

    scenario = np.where(bought.cents > HIGH_AMOUNT_CENTS, 1, 0)
    scenario[terminal_until[bought.terminal] > day] = 2
    scenario[stolen] = 3
    return scenario, np.where(stolen, bought.cents * STOLEN_FACTOR, bought.cents)
