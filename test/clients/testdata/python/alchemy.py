"""SQLAlchemy over psycopg2 and asyncpg: reflection, ORM, pool, savepoints, server-side results."""
import asyncio
import sys

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, declarative_base, relationship

Base = declarative_base()


def say(what, v):
    print(f"{what}: {v!r}", flush=True)


class Owner(Base):
    __tablename__ = "owner"
    id = sa.Column(sa.Integer, primary_key=True)
    name = sa.Column(sa.String, unique=True)
    items = relationship("Item", back_populates="owner", order_by="Item.id")


class Item(Base):
    __tablename__ = "item"
    id = sa.Column(sa.Integer, primary_key=True)
    owner_id = sa.Column(sa.ForeignKey("owner.id"))
    price = sa.Column(sa.Numeric(10, 2))
    doc = sa.Column(sa.JSON)
    owner = relationship(Owner, back_populates="items")


url = sa.engine.URL.create("postgresql+psycopg2")
engine = sa.create_engine(url, pool_size=3, future=True)
Base.metadata.create_all(engine)
say("version", engine.dialect.server_version_info[:1])
with Session(engine, future=True) as s:
    for n in range(10):
        s.add(Owner(name=f"o{n}", items=[Item(price=k, doc={"k": k}) for k in range(5)]))
    s.commit()
    one = s.execute(sa.select(Owner).where(Owner.name == "o3")).scalar_one()
    say("items", [(i.price, i.doc) for i in one.items])
    try:
        with s.begin_nested():
            s.add(Owner(name="o3"))
            s.flush()
    except sa.exc.IntegrityError as e:
        say("unique", e.orig.pgcode)
    s.delete(one.items[0])
    s.commit()
    say("sum", s.execute(sa.select(sa.func.count(), sa.func.sum(Item.price))).one())
    s.execute(sa.update(Item).values(price=Item.price * 2))
    s.rollback()
    say("rolled back", s.execute(sa.select(sa.func.sum(Item.price))).scalar())
with engine.connect().execution_options(stream_results=True, yield_per=10) as c:
    say("streamed", len(c.execute(sa.select(Item.id)).all()))
insp = sa.inspect(engine)
say("reflected", [(t, [c["name"] for c in insp.get_columns(t)], insp.get_pk_constraint(t)["constrained_columns"], [f["referred_table"] for f in insp.get_foreign_keys(t)]) for t in sorted(insp.get_table_names())])
for level in ("SERIALIZABLE", "AUTOCOMMIT", "REPEATABLE READ"):
    with engine.connect().execution_options(isolation_level=level) as c:
        say(level, c.execute(sa.text("SHOW transaction_isolation")).scalar())
engine.dispose()


async def main():
    e = create_async_engine(sa.engine.URL.create("postgresql+asyncpg"), pool_size=3)

    async def one(i):
        async with e.begin() as c:
            await c.execute(sa.insert(Owner).values(name=f"async{i}"))
            return (await c.execute(sa.select(sa.func.count()).where(Owner.name == f"async{i}"))).scalar()
    say("async", sum(await asyncio.gather(*(one(i) for i in range(20)))))
    await e.dispose()

asyncio.run(main())
